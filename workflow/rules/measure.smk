# Measures: finished runs in, one tidy table out. One rule and one job for each that the studies declare.
for measure in PLAN.study.measures:
    job = PLAN.measure(measure)
    base = f"{RESULTS}/{measure.path}"
    folders = [f"{RESULTS}/{run.path}" for run in measure.runs]

    rule:
        name:
            measure.rule
        input:
            cards=PLAN.cards(measure),
            records=[f"{folder}/run.json" for folder in folders],
            metrics=[f"{folder}/metrics.csv" for folder in folders],
            checkpoints=[f"{folder}/checkpoints" for folder in folders],
        output:
            **({"arrays": f"{base}.npz"} if measure.arrays else {}),
            csv=f"{base}.csv",
            record=f"{base}.run.json",
        log:
            f"{RESULTS}/logs/{measure.path}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{measure.path}.tsv"
        conda:
            ENVIRONMENT
        threads: measure.threads
        resources:
            mem_mb=PLAN.resource("measure", "mem_mb", 4000),
            runtime=PLAN.resource("measure", "runtime", 120),
            gpu=GPUS,
        params:
            **job.params,
        shell:
            "python -m papers.cli.measure --spec {params.spec:q} --code {params.code:q} --threads {threads}"
            f" --results {RESULTS} --data data --out {{output.csv}} > {{log}} 2>&1"
