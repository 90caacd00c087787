"""Sharing out the GPUs of a node, and what a request for a device comes to."""

from __future__ import annotations

import multiprocessing
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from curvspace.device import claim, use, visible
from curvspace.errors import UserError


def test_jobs_get_a_free_device_and_share_evenly_when_none_is_free(tmp_path):
    with ExitStack() as held:
        taken = [held.enter_context(claim(["0", "1", "2"], tmp_path)) for _ in range(7)]
        assert taken == [0, 1, 2, 0, 1, 2, 0]
    with claim(["0", "1", "2"], tmp_path) as again:
        assert again == 0


def _hold(folder: Path, ready, end) -> None:
    with claim(["0", "1"], folder) as index:
        ready.put(index)
        end.wait(20)


def test_claims_hold_between_processes_and_end_with_a_killed_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, end))
    process.start()
    assert ready.get(timeout=20) == 0
    with claim(["0", "1"], tmp_path) as index:
        assert index == 1
    process.kill()
    process.join()
    with claim(["0", "1"], tmp_path) as index:
        assert index == 0


def test_devices_have_names_that_hold_across_processes():
    assert visible(2, {"CUDA_VISIBLE_DEVICES": "3,5"}) == ["3", "5"]
    assert visible(2, {}) == ["0", "1"]
    assert visible(1, {"CUDA_VISIBLE_DEVICES": "GPU-8f, GPU-9a"}) == ["0"]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_requests(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with use("cpu") as device:
        assert device.type == "cpu"
    with use("auto") as device:
        assert device.type == ("cuda" if count else "cpu")
    if count == 4:
        with use("cuda:3") as device:
            assert device.index == 3
    for request in ("gpu", "cuda:", f"cuda:{count}", *([] if count else ["cuda"])):
        with pytest.raises(UserError, match=f"device = '{request}'"), use(request):
            pass


def test_what_a_scheduler_assigned_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with use("cuda") as first, use("cuda") as second:
        assert (first.index, second.index) == (0, 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("SLURM_JOB_ID")
    with use("cuda") as first, use("auto") as second:
        assert (first.index, second.index) == (0, 1)
