# Data sets: obtained once, checked against a known checksum, written as plain arrays.
SOURCES = PLAN.source_options().replace("{", "{{").replace("}", "}}")


localrules:
    data,


rule data:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.data(f"data/{wildcards.folder}")),
    output:
        arrays="data/{folder}/arrays.npz",
        card="data/{folder}/card.json",
        record="data/{folder}/run.json",
    log:
        "data/.logs/{folder}.log",
    benchmark:
        "data/.benchmarks/{folder}.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(2000, "data/.logs/{folder}.log"),
        runtime=growing(60),
    message:
        "data {wildcards.folder}"
    shell:
        f"python -m curvspace.cli.data {SOURCES} --spec @{{input.spec:q}}"
        " --out data/{wildcards.folder:q} > {log:q} 2>&1"
