# Which results are stale, told from the records beside them alone: `snakemake verify`.
localrules:
    verify,


rule verify:
    log:
        f"{RESULTS}/logs/verify.log",
    conda:
        ENVIRONMENT
    threads: 1
    params:
        config=canonical(config),
    shell:
        f"python -m workflow.verify --config {{params.config:q}} 2>&1 | tee {{log}}"
