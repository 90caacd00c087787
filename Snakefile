# From data to figures, tables and claims: `snakemake --cores all --resources gpu=1`.
# What is computed is declared by the studies in lib/papers; the config says at which scale.
import shlex
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.6")

ROOT = Path(workflow.basedir)
sys.path[:0] = [str(ROOT), str(ROOT / "lib")]  # this checkout's code, whatever else is installed

from papers.common.study import NAME  # noqa: E402
from workflow.settings import check_file, whole  # noqa: E402
from workflow.specs import load, run_from, wants_gpu  # noqa: E402

check_file("config.yaml")


configfile: "config.yaml"


config.update(whole(config))
run_from(ROOT)
PLAN = load(dict(config), ROOT, check=workflow.is_main_process)
RESULTS = config["results"]
QUOTED = shlex.quote(RESULTS)
GPUS = int(wants_gpu(config["device"]))
ENVIRONMENT = str(ROOT / "envs" / "pipeline.yaml").replace("{", "{{").replace("}", "}}")


wildcard_constraints:
    folder=NAME,
    dataset=NAME,
    model=NAME,
    optimizer=NAME,
    batch="[0-9]+|full",
    lr="[0-9.e+-]+?",
    seed="[0-9]+",
    measure=f"{NAME}(/{NAME})*",
    id=NAME,


report: "workflow/report/workflow.rst"


include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/figure.smk"
include: "workflow/rules/table.smk"
include: "workflow/rules/claims.smk"
include: "workflow/rules/verify.smk"


config["captions"] = PLAN.captions  # for the report; the plan has the config without them


rule all:
    default_target: True
    input:
        rules.claims.output,
        [f"{RESULTS}/{artefact.path}.csv" for artefact in PLAN.study.artefacts],
