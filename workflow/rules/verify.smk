# Which results are stale, told from the records beside them alone: `snakemake verify`.
localrules:
    verify,


rule verify:
    input:
        config=lambda wildcards: PLAN.config_file(),
    log:
        f"{RESULTS}/logs/verify.log",
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    message:
        "verify"
    shell:
        "python -m workflow.verify --config @{input.config:q} 2>&1 | tee {log:q}"
