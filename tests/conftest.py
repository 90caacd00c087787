"""What many unit tests share: the embedded digits, and a machine with tiny data sets and no client programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# One thread a process: two workers share the cores, and a process forked after a parallel region of torch's would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import torch

    from curvspace.datasets.catalogue import Known
    from curvspace.datasets.store import Arrays


def _devices() -> list[str]:
    """The CPU, and a GPU where there is one. The one that ``make gpu-check`` names must be there."""
    named = os.environ.get("GPU_CHECK_DEVICE")
    if named is None:
        import torch

        named = "cuda" if torch.cuda.is_available() else "cpu"
    return list(dict.fromkeys(["cpu", named]))


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A command called in this process sets denormal numbers to zero for good; the next test has them again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    import torch

    return torch.device("cuda:0" if request.param == "cuda" else request.param)


@pytest.fixture
def gpu() -> Iterator[None]:
    """The simulated one."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a real one is there")
    from tests.unit.simulated_gpu import simulated_gpu

    with simulated_gpu():
        yield


@pytest.fixture
def reproducible() -> Iterator[None]:
    """All digits of float32 and the same kernels twice, as in a run."""
    from curvspace.arithmetic import reproducible

    with reproducible():
        yield


@pytest.fixture
def torchs_own_precision() -> Iterator[None]:
    """What a test says of TF32 is taken back."""
    yield
    import torch

    from curvspace.arithmetic import _PRODUCTS

    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for backend, of in _PRODUCTS:
        on = backend == "cuda" and of != "matmul"
        torch._C._set_fp32_precision_setter(backend, of, "tf32" if on else "none")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test that takes a device is marked ``gpu``."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from curvspace.datasets import prepare

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, offline=True)
    return folder


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Arrays, Known]]:
    """Make the tiny arrays the ones that are expected under a name."""
    from curvspace.datasets.catalogue import KNOWN
    from tests.unit import source_files as files

    def register(name: str) -> tuple[Arrays, Known]:
        arrays, known = files.tiny(name)
        monkeypatch.setitem(KNOWN, name, known)
        return arrays, known

    return register


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without any client program; scratch folders are made where they can be counted."""
    programs, scratch = tmp_path / "programs", tmp_path / "scratch"
    programs.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield programs
    assert list(scratch.glob("curvspace-*")) == []  # nothing partial is left
