# Measures: finished runs and data sets in, one tidy table out.
rule measure:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.measure(wildcards.measure)),
        made=lambda wildcards: PLAN.measured(wildcards.measure),
    output:
        csv=f"{RESULTS}/measures/{{measure}}.csv",
        record=f"{RESULTS}/measures/{{measure}}.run.json",
    log:
        f"{RESULTS}/logs/measures/{{measure}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/measures/{{measure}}.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(
            PLAN.resource("measure", "mem_mb", 4000), f"{RESULTS}/logs/measures/{{measure}}.log"
        ),
        runtime=growing(PLAN.resource("measure", "runtime", 120)),
        gpu=GPUS,
    message:
        "measure {wildcards.measure}"
    shell:
        "python -m papers.cli.measure --spec @{input.spec:q} --threads {threads}"
        f" --results {QUOTED} --data data --out {{output.csv:q}} > {{log:q}} 2>&1"
