# Data sets: obtained once, checked against a known checksum, written as plain arrays.
SOURCES = PLAN.source_options()


localrules:
    data,


rule data:
    output:
        arrays="data/{folder}/arrays.npz",
        card="data/{folder}/card.json",
        record="data/{folder}/run.json",
    log:
        "data/.logs/{folder}.log",
    benchmark:
        "data/.benchmarks/{folder}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        spec=lambda wildcards: PLAN.data(f"data/{wildcards.folder}").params["spec"],
        code=lambda wildcards: PLAN.data(f"data/{wildcards.folder}").params["code"],
    shell:
        f"python -m curvspace.cli.data {SOURCES} --spec {{params.spec:q}} --code {{params.code:q}}"
        " --out data/{wildcards.folder} > {log} 2>&1"
