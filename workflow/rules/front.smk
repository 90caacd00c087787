# The report's front page: what came out, with the pictures that the studies put first.
rule front:
    input:
        spec=lambda wildcards: PLAN.spec(PLAN.front),
        claims=rules.claims.output.csv,
        figures=lambda wildcards: PLAN.front_pictures,
    output:
        html=report(
            f"{RESULTS}/front.html",
            caption="../report/front.rst",
            category="Findings",
            labels={"id": "front", "title": "What came out, in ten pictures"},
        ),
        record=f"{RESULTS}/front.run.json",
    log:
        f"{RESULTS}/logs/front.log",
    benchmark:
        f"{RESULTS}/benchmarks/front.tsv"
    conda:
        lambda wildcards: ENVIRONMENT
    threads: 1
    resources:
        mem_mb=growing(1500, f"{RESULTS}/logs/front.log"),
        runtime=growing(20),
    message:
        "front page"
    shell:
        "python -m papers.cli.front --spec @{input.spec:q}"
        f" --results {QUOTED} --out {{output.html:q}} > {{log:q}} 2>&1"
