# Training runs: one job for each (data set, model, optimiser, batch size, learning rate, seed).
# The state that an interrupted run resumes from is no output: Snakemake deletes the outputs of a failed job.
RUN = "{dataset}/{model}/{optimizer}/bs{batch}-lr{lr}-seed{seed}"
STATE = RUN.replace("{", "{wildcards.").replace("}", ":q}")


rule train:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.train_at(wildcards)),
        card=lambda wildcards: f"{PLAN.data_folder(wildcards.dataset)}/card.json",
    output:
        metrics=f"{RESULTS}/runs/{RUN}/metrics.csv",
        checkpoints=directory(f"{RESULTS}/runs/{RUN}/checkpoints"),
        record=f"{RESULTS}/runs/{RUN}/run.json",
    log:
        f"{RESULTS}/logs/train/{RUN}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{RUN}.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: config["threads"]
    resources:
        mem_mb=growing(PLAN.resource("train", "mem_mb", 3000), f"{RESULTS}/logs/train/{RUN}.log"),
        runtime=growing(PLAN.resource("train", "runtime", 120)),
        gpu=GPUS,
    message:
        "train {wildcards.dataset}/{wildcards.model}/{wildcards.optimizer},"
        " batch {wildcards.batch}, learning rate {wildcards.lr}, seed {wildcards.seed}"
    shell:
        "python -m curvspace.cli.train --spec @{input.spec:q} --threads {threads}"
        ' --data "$(dirname {input.card:q})" --out "$(dirname {output.record:q})"'
        f" --state {QUOTED}/.state/{STATE} > {{log:q}} 2>&1"
