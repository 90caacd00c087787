"""What a machine offers, and what a job that failed asks for next."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from curvspace.cli import failures
from workflow import attempts, machine


@pytest.mark.parametrize(
    ("nodes", "visible", "count"),
    [
        ([], None, 0),
        ([], "0", 0),
        (["nvidia0"], None, 1),
        (["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"], None, 3),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "-1", 0),
        (["nvidia0"], "MIG-a,MIG-b", 2),
        (["nvidia0", "nvidia1"], "GPU-8f, GPU-9a", 2),
        (["nvidia0", "nvidia1"], "NoDevFiles", 0),  # what a Slurm says to a job without any
        (["nvidia0", "nvidia1"], "1,-1,0", 1),
        (["kfd"], None, 1),
    ],
)
def test_gpus_are_counted_as_jobs_see_them(tmp_path, nodes, visible, count):
    for name in nodes:
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert machine.gpus(environment, tmp_path) == count


@pytest.mark.parametrize(("torch", "wanted"), [("2.15.0", True), ("2.15.0+cu132", True), ("2.15.0+cpu", False)])
def test_a_torch_without_gpus_asks_for_none(monkeypatch, torch, wanted):
    """Jobs that did would wait for each other under --resources gpu=1, and compute on CPUs all the same."""
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    monkeypatch.setattr(machine.metadata, "version", lambda name: torch)
    assert machine.wants_gpu("auto") is wanted
    assert machine.wants_gpu("cuda")
    assert not machine.wants_gpu("cpu")


@pytest.mark.parametrize(
    ("device", "here", "said", "stops"),
    [
        ("cuda", True, "but this machine has no GPU", True),
        ("cuda:1", True, "but this machine has no GPU", True),
        ("cuda", False, "", False),  # the login node of a cluster
        ("auto", False, "no job asks the cluster for one", False),
        ("auto", True, "", False),
        ("cpu", True, "", False),
        ("cpu", False, "", False),
    ],
)
def test_a_gpu_that_is_not_there_is_said(monkeypatch, device, here, said, stops):
    monkeypatch.setattr(machine, "gpus", lambda: 0)
    line, stop = machine.without_gpu(device, here)
    assert said in line
    assert bool(line) == bool(said)
    assert stop == stops
    assert "\n" not in line
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    assert machine.without_gpu(device, here) == ("", False)


@pytest.mark.parametrize(
    ("age", "accounts", "said"), [("300", None, False), ("20", None, True), ("20", "", False), (None, None, False)]
)
def test_a_slurm_that_forgets_its_jobs_is_said(monkeypatch, age, accounts, said):
    config = None if age is None else f"MessageTimeout = 10 sec\nMinJobAge               = {age} sec\n"
    monkeypatch.setattr(machine, "_says", lambda *command: config if command[0] == "scontrol" else accounts)
    assert bool(machine.forgetful_slurm()) == said


TRACE = "step 3\nTraceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("log", "lasting"),
    [
        ("curvspace train: the learning rate is text\n", True),
        (f"{TRACE}ValueError: shapes differ\n\n", True),
        (f"{TRACE}mymodule.Broken\n", True),
        (f"{TRACE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", False),
        (f"{TRACE}RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory\n", False),
        (f"{TRACE}MemoryError\n", False),
        ("curvspace train: stopped at step 3 of 9; the same command continues from there\n", False),
        ("curvspace train: x cannot be written: No space left on device; mend that\n", False),
        ("curvspace train: device = 'cuda', but this machine has 0 GPUs that torch can use\n", False),
        (f"{TRACE}curvspace train: KeyError: 'width', at nets.py:12 (build)\n", True),
        (f"{TRACE}curvspace train: {failures.line(MemoryError('Unable to allocate 8 GiB'))}\n", False),
        (f"{TRACE}curvspace train: {failures.line(OSError(28, 'No space left on device'))}\n", False),
        (f"curvspace measure: {failures.Told(15)}\n", False),
        ("step 3 of 9\n", False),  # killed
        ("", False),
    ],
)
def test_a_failure_that_more_time_or_memory_cannot_mend_is_told_from_its_log(log, lasting):
    assert bool(attempts.lasting(log)) == lasting


def test_each_attempt_asks_for_twice_as_much_and_a_lasting_failure_is_not_tried_again(tmp_path):
    log = tmp_path / "a.log"
    log.write_text(f"{TRACE}ValueError: shapes differ\n")
    wildcards = SimpleNamespace(items=lambda: [("name", "a")])
    head = attempts.growing(1000, f"{tmp_path}/{{name}}.log", in_job=False)
    assert [head(wildcards, attempt) for attempt in (1, 2, 3)] == [1000, 2000, 4000]
    job = attempts.growing(1000, f"{tmp_path}/{{name}}.log", in_job=True)
    assert job(wildcards, 1) == 1000
    with pytest.raises(SystemExit, match=r"not tried again.*: ValueError: shapes differ"):
        job(wildcards, 2)
    log.write_text("killed\n")
    assert job(wildcards, 2) == 2000


def test_the_paper_preset_stops_with_one_line_where_there_is_no_gpu(project):
    if machine.gpus():
        pytest.skip("this machine has a GPU")
    project.edit("config.yaml", "device: cpu", "device: cuda")
    done = project.snakemake("results/measures/mini/spectrum.csv")
    assert done.returncode != 0
    assert done.stderr.count("but this machine has no GPU") == 1
    assert "Traceback" not in done.stderr


def test_the_status_of_a_job_that_the_scheduler_forgot(tmp_path):
    from tests.pipeline.conftest import ROOT

    script = ROOT / "workflow" / "profiles" / "cluster-generic" / "status.py"
    queue = tmp_path / "squeue"
    (tmp_path / "logs" / "cluster").mkdir(parents=True)
    left = tmp_path / "logs" / "cluster" / "7.exit"

    def status(answer: str, exit_status: str | None) -> str:
        queue.write_text(f"#!/bin/sh\n{answer}\n")
        queue.chmod(0o755)
        left.unlink(missing_ok=True)
        if exit_status is not None:
            left.write_text(exit_status)
        command = [sys.executable, str(script), "7"]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout.strip()

    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    assert status(forgotten, "0\n") == "success"
    assert status(forgotten, "1\n") == "failed"
    assert status(forgotten, None) == "failed"
    assert status("echo RUNNING", "0\n") == "running"  # requeued
    assert status("echo TIMEOUT", None) == "failed"
    assert status("echo 'Unable to contact controller' >&2; exit 1", None) == "running"
