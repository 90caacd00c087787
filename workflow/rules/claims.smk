# The claims ledger: what each checkable statement of the papers came to, from the tables of all studies.
rule claims:
    input:
        tables=PLAN.claim_tables,
        claims=PLAN.claim_files,
    output:
        csv=f"{RESULTS}/claims.csv",
        markdown=f"{RESULTS}/claims.md",
        html=report(
            f"{RESULTS}/claims.html",
            caption="../report/claims.rst",
            category="Claims",
            labels={"id": "claims", "title": "What held of the papers' statements"},
        ),
        record=f"{RESULTS}/claims.run.json",
    log:
        f"{RESULTS}/logs/claims.log",
    benchmark:
        f"{RESULTS}/benchmarks/claims.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1500,
        runtime=20,
    params:
        **PLAN.claims.params,
    shell:
        "python -m papers.cli.claims --spec {params.spec:q} --code {params.code:q}"
        f" --claims {{input.claims:q}} --results {RESULTS} --out {{output.csv}} > {{log}} 2>&1"
