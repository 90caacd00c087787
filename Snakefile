# From data to figures, tables and claims: `snakemake --cores all --resources gpu=1`.
# What is computed is declared by the studies in lib/papers; the config says at which scale.
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.6")

ROOT = Path(workflow.basedir)
sys.path[:0] = [str(ROOT), str(ROOT / "lib")]  # this checkout's code, whatever else is installed

from workflow.settings import whole  # noqa: E402
from workflow.specs import canonical, load, wants_gpu  # noqa: E402


configfile: "config.yaml"


config.update(whole(config))
PLAN = load(config, ROOT)
RESULTS = config["results"]
GPUS = int(wants_gpu(config["device"]))
ENVIRONMENT = str(ROOT / "envs" / "pipeline.yaml")

shell.prefix(
    f"set -euo pipefail; export PYTHONPATH='{ROOT}/lib:{ROOT}':\"${{{{PYTHONPATH:-}}}}\"; "
)


report: "workflow/report/workflow.rst"


include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/claims.smk"
include: "workflow/rules/verify.smk"


config["captions"] = PLAN.captions  # for the report; the checks have seen the config without them


rule all:
    default_target: True
    input:
        rules.claims.output,
        [f"{RESULTS}/{artefact.path}.csv" for artefact in PLAN.study.artefacts],
