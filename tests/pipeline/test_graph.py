"""The pipeline as Snakemake sees it: lints, wrong configs, the cluster profile, target rule."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT


def test_lints_and_formatting(finished):
    linted = finished.snakemake("--lint")
    assert linted.returncode == 0, linted.stdout + linted.stderr
    formatted = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", ROOT / "Snakefile", ROOT / "workflow"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert formatted.returncode == 0, formatted.stderr


def test_a_wrong_value_is_one_line_and_no_traceback(project):
    project.edit("config.yaml", "lrs: [0.1, 0.01]", "lrs: [1e-1, 0.01]")
    done = project.snakemake("-n")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("config: ")] == [
        "config: studies.mini.lrs[0] = '1e-1' is not allowed; YAML reads it as text; write it as a number: 0.1"
    ]
    assert "Traceback" not in done.stderr + done.stdout


def test_a_disabled_study_is_not_part_of_the_graph(project):
    project.edit("config.yaml", "mini: {", "mini: {enabled: false, ")
    assert project.planned("--forceall") == {"claims"}


def show_resources(project) -> None:
    """Take the messages out of the rules: Snakemake then lists what each job asks for."""
    for file in (project.folder / "workflow" / "rules").glob("*.smk"):
        file.write_text(re.sub(r"    message:\n(        .*\n)+", "", file.read_text()))


def test_the_cluster_profile_plans_the_graph_with_a_gpu_a_job(project):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    profile = project.folder / "workflow" / "profiles" / "slurm"
    settings = yaml.safe_load((profile / "config.yaml").read_text())
    assert settings["set-resource-scopes"] == {"gpu": "local"}
    project.edit("config.yaml", "device: cpu", "device: cuda")
    show_resources(project)
    done = project.snakemake("-n", "--profile", str(profile), "--resources", "gpu=1")
    assert done.returncode == 0, done.stderr
    plan = done.stdout + done.stderr
    trained = [block for block in plan.split("\n\n") if "rule train:" in block]
    assert len(trained) == 5
    assert all("gpu=1" in block and "slurm_partition=main" in block for block in trained)


def test_on_the_cpu_no_job_asks_for_a_gpu(project):
    show_resources(project)
    done = project.snakemake("-n", "--forceall", "--resources", "gpu=1")
    resources = [line for line in done.stdout.splitlines() if line.startswith("    resources: ")]
    assert any("gpu=0" in line for line in resources)
    assert not any("gpu=1" in line for line in resources)


def test_a_run_that_no_study_asks_for_can_be_asked_for_by_its_path(finished):
    path = "results/runs/digits/conv/curveball/bs32-lr0.5-seed7/metrics.csv"
    assert finished.planned(path) == {"train digits/conv/curveball, batch 32, learning rate 0.5, seed 7"}


@pytest.mark.parametrize("absolute", [False, True])
def test_several_things_can_be_asked_for_at_once_before_there_is_any(project, absolute):
    results = project.folder / "others" if absolute else "others"
    runs = [f"{results}/runs/digits/conv/curveball/bs32-lr0.5-seed{seed}/metrics.csv" for seed in (7, 8)]
    planned = project.planned(*runs, "--config", f"results={results}")
    wanted = {f"train digits/conv/curveball, batch 32, learning rate 0.5, seed {seed}" for seed in (7, 8)}
    assert wanted <= planned


def test_the_workflow_is_planned_without_importing_torch_and_scipy():
    code = (
        "import sys, yaml; from pathlib import Path;"
        "from workflow.settings import whole; from workflow.specs import load;"
        "jobs = list(load(whole(yaml.safe_load(open('config.yaml'))), Path()).jobs());"
        "print(len(jobs), bool({'torch', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'lib']; {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    count, torch = done.stdout.split()
    assert int(count) > 20, done.stderr
    assert torch == "False"
