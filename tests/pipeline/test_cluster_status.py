"""What the profile for any scheduler says of a job, by a stand-in for the queue."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "workflow/profiles/cluster-generic/status.py"
UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller"


@pytest.mark.parametrize(
    ("queue", "left", "said"),
    [
        ((0, "RUNNING\n", ""), None, "running"),
        ((0, "PENDING\n", ""), "0\n", "running"),  # sent again after its node was lost
        ((0, "COMPLETED\n", ""), "0\n", "success"),
        ((1, "", UNKNOWN), "0\n", "success"),
        ((1, "", UNKNOWN), "1\n", "failed"),
        ((1, "", UNKNOWN), "", "failed"),  # killed while it wrote
        ((0, "NODE_FAIL\n", ""), None, "failed"),
        ((1, "", AWAY), None, "running"),
        (subprocess.TimeoutExpired("squeue", 60), None, "running"),
        (BlockingIOError(11, "Resource temporarily unavailable"), None, "running"),
    ],
)
def test_a_job_is_told_by_the_queue_and_the_file_that_it_left(queue, left, said, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("cluster_status", FILE)
    status = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(status)

    def asked(command, **options):
        if isinstance(queue, Exception):
            raise queue
        return subprocess.CompletedProcess(command, *queue)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", asked)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if left is not None:
        (tmp_path / "logs/cluster").mkdir(parents=True)
        (tmp_path / "logs/cluster/7.exit").write_text(left)
    assert status.state("7") == said
