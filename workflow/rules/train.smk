# Training runs: one job for each (data set, model, optimiser, batch size, learning rate, seed).
# The state that an interrupted run resumes from is no output: Snakemake deletes the outputs of a failed job.
wildcard_constraints:
    dataset="[^/]+",
    model="[^/]+",
    optimizer="[^/]+",
    batch="[0-9]+|full",
    lr="[0-9.e+-]+?",
    seed="[0-9]+",


RUN = "{dataset}/{model}/{optimizer}/bs{batch}-lr{lr}-seed{seed}"


rule train:
    input:
        lambda wildcards: f"{PLAN.data_folder(wildcards.dataset)}/card.json",
    output:
        metrics=f"{RESULTS}/runs/{RUN}/metrics.csv",
        checkpoints=directory(f"{RESULTS}/runs/{RUN}/checkpoints"),
        record=f"{RESULTS}/runs/{RUN}/run.json",
    log:
        f"{RESULTS}/logs/train/{RUN}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{RUN}.tsv"
    conda:
        ENVIRONMENT
    threads: config["threads"]
    resources:
        mem_mb=PLAN.resource("train", "mem_mb", 3000),
        runtime=PLAN.resource("train", "runtime", 120),
        gpu=GPUS,
    params:
        spec=lambda wildcards: PLAN.train_at(wildcards).params["spec"],
        code=lambda wildcards: PLAN.train_at(wildcards).params["code"],
    shell:
        "python -m curvspace.cli.train --spec {params.spec:q} --code {params.code:q} --threads {threads}"
        ' --data "$(dirname {input:q})" --out "$(dirname {output.record:q})"'
        f" --state {RESULTS}/.state/{{wildcards.dataset}}/{{wildcards.model}}/{{wildcards.optimizer}}/"
        "bs{wildcards.batch}-lr{wildcards.lr}-seed{wildcards.seed} > {log} 2>&1"
