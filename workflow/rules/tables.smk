# Tables: tables in, one table out as CSV, Markdown, LaTeX and HTML. One rule for each that the studies declare.
for artefact in PLAN.study.artefacts:
    if artefact.kind != "table":
        continue
    job = PLAN.artefact(artefact)
    base = f"{RESULTS}/{artefact.path}"

    rule:
        name:
            artefact.rule
        input:
            [f"{RESULTS}/{table}" for table in artefact.files],
        output:
            csv=f"{base}.csv",
            markdown=f"{base}.md",
            latex=f"{base}.tex",
            html=report(f"{base}.html", **PLAN.report(artefact)),
            record=f"{base}.run.json",
        log:
            f"{RESULTS}/logs/{artefact.path}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{artefact.path}.tsv"
        conda:
            ENVIRONMENT
        threads: 1
        resources:
            mem_mb=1500,
            runtime=20,
        params:
            **job.params,
        shell:
            "python -m papers.cli.table --spec {params.spec:q} --code {params.code:q}"
            f" --results {RESULTS} --out {{output.csv}} > {{log}} 2>&1"
