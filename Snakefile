# From data to figures, tables and claims: `snakemake --cores all --resources gpu=1`.
# What is computed is declared by the studies in lib/papers; the config says at which scale.
import shlex
import sys
from functools import partial
from pathlib import Path

from snakemake.utils import min_version

min_version("9.6")

ROOT = Path(workflow.basedir)
sys.path[:0] = [str(ROOT), str(ROOT / "lib")]  # this checkout's code, whatever else is installed

from papers.common.study import NAME  # noqa: E402
from workflow import attempts, machine  # noqa: E402
from workflow.settings import check_file, whole  # noqa: E402
from workflow.specs import load, run_from  # noqa: E402

check_file("config.yaml")


configfile: "config.yaml"


config.update(whole(config))
run_from(ROOT)
PLAN = load(dict(config), ROOT, check=workflow.is_main_process)
RESULTS = config["results"]
QUOTED = shlex.quote(RESULTS)
growing = partial(attempts.growing, in_job=not workflow.is_main_process)
GPUS = int(machine.wants_gpu(config["device"]))
if config["device"] in ("auto", "cuda") and "gpu" in workflow.global_resources:
    # `--resources gpu=1` is the command for any machine; where it has more GPUs, jobs share them out.
    if workflow.global_resources["gpu"].value == 1 < machine.gpus():
        workflow.register_resource("gpu", machine.gpus())
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


onstart:
    here = workflow.local_exec
    said, stop = machine.without_gpu(config["device"], here)
    if said and any(
        job.resources.get("gpu", 0) or not stop for job in workflow.dag.needrun_jobs()
    ):
        if stop:
            sys.exit(said)
        print(said, file=sys.stderr)
    if not here and (said := machine.forgetful_slurm()):
        print(said, file=sys.stderr)


rule all:
    default_target: True
    input:
        rules.claims.output,
        [f"{RESULTS}/{artefact.path}.csv" for artefact in PLAN.study.artefacts],
