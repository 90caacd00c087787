# Tables: tables in, one table out as CSV, Markdown, LaTeX and HTML.
rule table:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.artefact(wildcards.id)),
        tables=lambda wildcards: PLAN.drawn_from(wildcards.id),
    output:
        csv=f"{RESULTS}/tables/{{id}}.csv",
        markdown=f"{RESULTS}/tables/{{id}}.md",
        latex=f"{RESULTS}/tables/{{id}}.tex",
        html=report(
            f"{RESULTS}/tables/{{id}}.html",
            caption="../report/artefact.rst",
            category=lambda wildcards: PLAN.category(wildcards.id),
            subcategory="Tables",
            labels=lambda wildcards: PLAN.labels(wildcards.id),
        ),
        record=f"{RESULTS}/tables/{{id}}.run.json",
    log:
        f"{RESULTS}/logs/tables/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tables/{{id}}.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(1500, f"{RESULTS}/logs/tables/{{id}}.log"),
        runtime=growing(20),
    message:
        "table {wildcards.id}"
    shell:
        "python -m papers.cli.table --spec @{input.spec:q}"
        f" --results {QUOTED} --out {{output.csv:q}} > {{log:q}} 2>&1"
