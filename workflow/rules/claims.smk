# The claims ledger: what each checkable statement of the papers came to, from the tables of all studies.
rule claims:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.claims),
        tables=lambda wildcards: PLAN.claim_tables,
        claims=lambda wildcards: PLAN.claim_files,
    output:
        csv=f"{RESULTS}/claims.csv",
        markdown=f"{RESULTS}/claims.md",
        html=report(
            f"{RESULTS}/claims.html",
            caption="../report/claims.rst",
            category="Statements, judged",
            labels={"id": "claims", "title": "What held of the papers' statements"},
        ),
        record=f"{RESULTS}/claims.run.json",
    log:
        f"{RESULTS}/logs/claims.log",
    benchmark:
        f"{RESULTS}/benchmarks/claims.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(1500, f"{RESULTS}/logs/claims.log"),
        runtime=growing(20),
    message:
        "claims"
    shell:
        "python -m papers.cli.claims --spec @{input.spec:q} --claims {input.claims:q}"
        f" --results {QUOTED} --out {{output.csv:q}} > {{log:q}} 2>&1"
