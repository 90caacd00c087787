# Figures: tables in, a picture and the CSV it was drawn from out. One rule for each that the studies declare.
for artefact in PLAN.study.artefacts:
    if artefact.kind != "figure":
        continue
    job = PLAN.artefact(artefact)
    base = f"{RESULTS}/{artefact.path}"

    rule:
        name:
            artefact.rule
        input:
            [f"{RESULTS}/{table}" for table in artefact.files],
        output:
            png=report(f"{base}.png", **PLAN.report(artefact)),
            pdf=f"{base}.pdf",
            csv=f"{base}.csv",
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
            "python -m papers.cli.figure --spec {params.spec:q} --code {params.code:q}"
            f" --results {RESULTS} --out {{output.csv}} > {{log}} 2>&1"
