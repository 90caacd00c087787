"""Extreme eigenpairs on networks of several kinds and sizes: time, products, true residuals and peak memory.

Each solve runs in a process forked for it, so that its peak memory is its own; seconds are processor seconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.problem import CLASSES, Problem
from benchmarks.rows import _accuracy
from curvspace import Objective, models
from curvspace.denormals import flushed

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network at some parameters, the data, and which pairs are wanted."""

    model: nn.Module
    x: Tensor
    y: Tensor
    ends: tuple[tuple[int, str], ...] = ((10, "LA"), (3, "SA"))
    tools: tuple[str, ...] = ("curvspace", "ARPACK on our products", "curvlinops", "hessian_eigenthings", "pyhessian")
    most_steps: int = 200
    tol: float = 1e-3


FEW = ("curvspace", "ARPACK on our products", "curvlinops", "hessian_eigenthings")


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 0.02, batch: int = 128) -> nn.Module:
    """SGD with momentum 0.9 on random batches (seed 0); afterwards in eval mode."""
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        part = torch.randint(len(x), (min(batch, len(x)),), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval()


def cnn(problem: Problem) -> Case:
    return Case(problem.model, *problem.take(512))


def fitted(problem: Problem) -> Case:
    """A convolutional network (P = 27,610) trained on separable images, 24 x 24, until it fits them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1536) % CLASSES
    patterns = torch.randn(CLASSES, 1, 24, 24, generator=generator)
    x = patterns[y] + 0.5 * torch.randn(1536, 1, 24, 24, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288, 48), nn.ReLU(), nn.Linear(48, CLASSES)),
    )
    with flushed():
        return Case(train(model, x, y, 60, 0.01), x, y, ((10, "LA"),), FEW)


def mlp(problem: Problem) -> Case:
    torch.manual_seed(0)
    widths = (3072, 200, 200, 76)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    x, y = problem.take(512)
    return Case(train(nn.Sequential(nn.Flatten(), *layers, nn.Linear(76, CLASSES)), x, y, 300), x, y, tools=FEW)


class Transformer(nn.Module):
    """Two encoder layers of width 64 over 16 patches of 8 x 8; normalisation first, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.position = nn.Parameter(0.02 * torch.randn(16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.position).mean(1))


def transformer(problem: Problem) -> Case:
    torch.manual_seed(0)
    x, y = problem.take(256)
    return Case(train(Transformer(), x, y, 200), x, y, ((10, "LA"),), FEW)


def resnet9(problem: Problem) -> Case:
    torch.manual_seed(0)
    x, y = problem.take(16)
    return Case(models.build("resnet9", {}, (3, 32, 32), CLASSES).eval(), x, y, ((10, "LA"),), FEW, 80, tol=1e-2)


def resnet18(problem: Problem) -> Case:
    """torchvision's network with 1,000 outputs, eval mode, 8 images of 32 x 32."""
    from torchvision.models import resnet18 as build

    torch.manual_seed(0)
    x, y = problem.take(8)
    return Case(build().eval(), x, y, ((5, "LA"),), FEW, 60, tol=1e-2)


def resnet18_larger(problem: Problem) -> Case:
    """The same network on 64 images, enlarged to 64 x 64: the top ten."""
    small = resnet18(problem)
    x, y = problem.take(64)
    return Case(small.model, F.interpolate(x, scale_factor=2, mode="bilinear"), y, ((10, "LA"),), FEW, 80, tol=1e-2)


NETWORKS: dict[str, Callable[[Problem], Case]] = {
    "CNN-60k, 512 images": cnn,
    "trained to fit, 28k, 1,536 images": fitted,
    "MLP-670k, 512 images": mlp,
    "transformer-76k, 256 images": transformer,
    "ResNet9, 16 images": resnet9,
    "ResNet-18, 8 images": resnet18,
    "ResNet-18, 64 images of 64 x 64": resnet18_larger,
}


def eigenpairs(problem: Problem, names: list[str]) -> Iterator[Row]:
    """Whole calls, set-up included, at a tolerance relative to each eigenvalue; true residuals are measured."""
    for name in names:
        case = NETWORKS[name](problem)
        tol = case.tol
        size = sum(p.numel() for p in case.model.parameters())
        dtype = torch.float64 if size < 1_000_000 else None
        exact = Objective(case.model, [(case.x, case.y)], dtype=dtype).hessian()
        for k, which in case.ends:
            ours: float | None = None
            for tool, solver in peers.available().items():
                if tool not in case.tools or (tool == "pyhessian" and which == "SA"):
                    continue  # power iteration finds magnitudes only
                if tool == "hessian_eigenthings":
                    peers.steps_to_converge(case.model, case.x, case.y, k, which, tol, case.most_steps)
                row: Row = {
                    "network": name,
                    "parameters": size,
                    "pairs": f"{which}({k})",
                    "tolerance": tol,
                    "tool": tool,
                }
                try:
                    seconds, memory, found = _alone(partial(solver, case.model, case.x, case.y, k, which, tol))
                except Failed as failed:
                    yield row | {"note": str(failed)}
                    continue
                ours = seconds if ours is None else ours
                accuracy = _accuracy(exact, found, which)
                yield row | {
                    "cpu_s": seconds,
                    "ratio": seconds / ours,
                    "products": found.products,
                    "largest_relative_residual": accuracy["residual_own"],
                    "peak_mb": memory,
                    "solver_share": found.share,
                    "value_first": accuracy["value_first"],
                    "value_last": accuracy["value_last"],
                }


class Failed(Exception):
    """A library that cannot do it; the message says why."""


def _alone(work: Callable[[], peers.Found]) -> tuple[float, float, peers.Found]:
    """Processor seconds, peak memory in MB above what the process began with, and the result, of work in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.pt"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(work, path))
        process.start()
        process.join()
        if process.exitcode:
            raise Failed(f"ended with status {process.exitcode}")
        result = torch.load(path, weights_only=False)
    if isinstance(result, str):
        raise Failed(result)
    return result


def _child(work: Callable[[], peers.Found], path: Path) -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what the parent has freed does not count as memory that is there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    start = time.process_time()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the peers' forward mode knows no other attention
        warnings.simplefilter("ignore")
        try:
            found = work()
        except Exception as error:
            torch.save(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", path)
            return
    seconds = time.process_time() - start
    torch.save((seconds, (_status("VmHWM") - before) / 1024, found), path)


def _status(name: str) -> int:
    """kB of this process, of ``/proc``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
