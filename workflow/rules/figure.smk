# Figures: tables in, a picture and the CSV it was drawn from out.
rule figure:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.artefact(wildcards.id)),
        tables=lambda wildcards: PLAN.drawn_from(wildcards.id),
    output:
        png=report(
            f"{RESULTS}/figures/{{id}}.png",
            caption="../report/artefact.rst",
            category=lambda wildcards: PLAN.category(wildcards.id),
            subcategory="Figures",
            labels=lambda wildcards: PLAN.labels(wildcards.id),
        ),
        pdf=f"{RESULTS}/figures/{{id}}.pdf",
        csv=f"{RESULTS}/figures/{{id}}.csv",
        record=f"{RESULTS}/figures/{{id}}.run.json",
    log:
        f"{RESULTS}/logs/figures/{{id}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/figures/{{id}}.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(1500, f"{RESULTS}/logs/figures/{{id}}.log"),
        runtime=growing(20),
    message:
        "figure {wildcards.id}"
    shell:
        "python -m papers.cli.figure --spec @{input.spec:q}"
        f" --results {QUOTED} --out {{output.csv:q}} > {{log:q}} 2>&1"
