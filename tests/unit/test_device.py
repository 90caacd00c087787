"""Sharing out the GPUs of a node, and what a request for a device comes to."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from curvspace import device as device_module
from curvspace.arithmetic import _PRODUCTS, arithmetic, full_float32, reproducible
from curvspace.curvature.frozen import _only_device
from curvspace.curvature.memory import default_budget
from curvspace.device import claim, use, visible
from curvspace.errors import UserError
from curvspace.optim.base import _require_alike


def test_jobs_get_a_free_device_and_share_evenly_when_none_is_free(tmp_path):
    with ExitStack() as held:
        taken = [held.enter_context(claim(["0", "1", "2"], tmp_path)) for _ in range(7)]
        assert taken == [0, 1, 2, 0, 1, 2, 0]
    with claim(["0", "1", "2"], tmp_path) as again:
        assert again == 0


def _hold(folder: Path, ready, end) -> None:
    with claim(["0", "1"], folder) as index:
        ready.put(index)
        end.wait(120)


def test_claims_hold_between_processes_and_end_with_a_killed_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, end))
    process.start()
    assert ready.get(timeout=120) == 0  # it imports torch
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


@pytest.fixture
def gpus(monkeypatch):
    """Make the machine have so many GPUs."""

    def have(count: int, usable: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and count > 0)

    return have


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_requested_device_is_there_or_named(gpus, count):
    gpus(count)
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


@pytest.mark.parametrize("job", [None, "17"])
def test_two_processes_that_see_two_devices_take_one_each_under_a_scheduler_too(monkeypatch, gpus, job):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"test-{os.getpid()}-{job}-a,test-{os.getpid()}-{job}-b")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    with use("cuda") as first, use("auto") as second:
        assert (first.index, second.index) == (0, 1)


def test_a_gpu_whose_driver_is_too_old_for_torch_is_none(gpus):
    """torch counts devices by the driver's own library and finds out only when it starts to use one."""
    gpus(2, usable=False)
    with use("auto") as device:
        assert device.type == "cpu"
    with pytest.raises(UserError, match="has 0 GPUs that torch can use"), use("cuda"):
        pass


def test_one_device_or_one_that_is_named_is_not_shared_out(monkeypatch, gpus):
    monkeypatch.setattr(device_module, "claim", None)
    gpus(1)
    with use("cuda") as first, use("auto") as second:
        assert (first.index, second.index) == (0, 0)
    gpus(2)
    with use("cuda:1") as named:
        assert named.index == 1


def _as_user(number: int, space: str) -> int:
    """Index that a process of another user, without a name and without a home, claims."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
                os.environ.pop(name, None)
            os.setuid(number)
            with claim(["0", "1", "2"], space) as index:
                os.write(writing, bytes([index]))
                os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.read(reading, 1)[0] if status == 0 else -1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_claims_hold_between_users_and_need_no_name_and_no_folder(tmp_path, monkeypatch):
    space = str(tmp_path)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with claim(["0", "1", "2"], space):
        assert _as_user(54321, space) == 1
        with claim(["0", "1", "2"], space):
            assert _as_user(65534, space) == 2
    assert _as_user(54321, space) == 0
    assert not list(tmp_path.iterdir())


def test_a_system_that_cannot_share_out_says_so_and_takes_the_first(monkeypatch, caplog, tmp_path):
    class Unable(socket.socket):
        def bind(self, address):
            raise OSError(errno.EINVAL, "invalid")

    monkeypatch.setattr(socket, "socket", Unable)
    with claim(["0", "1"], tmp_path) as first, claim(["0", "1"], tmp_path) as second:
        assert (first, second) == (0, 0)
    assert "cuda:1" in caplog.messages[0]


@pytest.mark.parametrize("tf32", [False, True])
def test_a_device_comes_with_full_float32_and_deterministic_operations_and_leaves_the_settings(tf32):
    before = arithmetic()
    with use("cpu", tf32=tf32):
        assert arithmetic() == {"tf32": tf32, "deterministic": True, "threads": torch.get_num_threads()}
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
        assert not torch.backends.cudnn.benchmark
    assert arithmetic() == before
    assert torch.get_deterministic_debug_mode() == 0
    with pytest.raises(ZeroDivisionError), use("cpu"):
        _ = 1 / 0
    assert arithmetic() == before


WAYS: dict[str, Callable[[], object]] = {
    "as torch has it": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer, everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "both": lambda: (WAYS["newer, everywhere"](), WAYS["older, off"]()),
}


def _precisions() -> dict[tuple[str, str], str]:
    return {one: torch._C._get_fp32_precision_getter(*one) for one in [*_PRODUCTS, ("generic", "all")]}


@pytest.mark.parametrize("way", WAYS)
def test_float32_has_all_its_digits_however_tf32_was_allowed_and_the_setting_comes_back(way, torchs_own_precision):
    """Torch has older and newer settings; it raises where the older are read after the newer were used, and one that is
    off by the older is on all the same where the newer one that it inherits is on."""
    WAYS[way]()
    before = _precisions()
    for kind, backend in (("cuda", "cuda"), ("cpu", "mkldnn")):
        with full_float32(torch.device(kind)):
            assert {v for one, v in _precisions().items() if one[0] == backend} <= {"none", "ieee"}
        assert _precisions() == before
    for tf32 in (False, True):
        with reproducible(tf32):
            assert {v for one, v in _precisions().items() if one[0] == "cuda"} <= ({"tf32"} if tf32 else {"ieee"})
            assert arithmetic()["tf32"] is tf32
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32  # compilers ask so
        assert _precisions() == before
    torch.backends.fp32_precision = "none"  # what was inherited still is
    inherited = way in ("newer, everywhere", "both")
    assert torch.backends.cuda.matmul.fp32_precision == ("none" if inherited else before["cuda", "matmul"])


def test_devices_without_float64_are_refused_in_words():
    parameters = {"weight": SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)}
    for refuse in (_only_device, lambda p: _require_alike("CurveBall", p)):
        with pytest.raises(ValueError, match=r"on mps, which has no float64.*move the model to the CPU"):
            refuse(parameters)


def test_free_memory_counts_what_torch_keeps_unused(monkeypatch):
    sizes = {"mem_get_info": (1000, 9000), "memory_reserved": 700, "memory_allocated": 300}
    for name, value in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert default_budget(torch.device("cuda", 0)) == (1000 + 400) // 2
