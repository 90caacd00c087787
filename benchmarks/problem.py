"""What is measured on: the 62,006-parameter network, real images, parameters after a short training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import models
from curvspace.datasets import load, prepare

TRAINING_STEPS = 400
CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """A model and normalised images (N, 3, 32, 32) with labels (N,), on the device."""

    model: nn.Module
    x: Tensor
    y: Tensor
    checkpoints: tuple[dict[str, Tensor], ...]
    """Parameters every 10 steps at the end of training."""

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        return self.x[:count], self.y[:count]


def images(folder: Path, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first CIFAR-10 training images, normalised; obtained first where they are not prepared yet."""
    if not (folder / "arrays.npz").exists():
        prepare("cifar10", folder)
    data = load(folder, {"source": "cifar10", "train": count, "subset_seed": 0}).to(device)
    return data.normalise(data.train.inputs), data.train.targets


def trained_problem(folder: Path, count: int, device: torch.device) -> Problem:
    """The network after 400 steps of SGD (batch 128, lr 0.02, momentum 0.9, seed 0) on the images measured on."""
    x, y = images(folder, count, device)
    torch.manual_seed(0)
    model = models.build("cnn-60k", {}, (3, 32, 32), CLASSES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    checkpoints = []
    for step in range(1, TRAINING_STEPS + 1):
        batch = torch.randint(len(x), (128,), generator=order).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step > TRAINING_STEPS - 50 and step % 10 == 0:
            checkpoints.append({name: p.detach().clone() for name, p in model.state_dict().items()})
    return Problem(model, x, y, tuple(checkpoints))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` adds up the threads and does not count waiting: for one thread on a machine with other load."""

_clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """What :func:`timed` reads from now on."""
    global _clock
    _clock = CLOCKS[name]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    synchronise(device)
    start = _clock()
    result = work()
    synchronise(device)
    return _clock() - start, result


def best_times(works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 7) -> dict[str, float]:
    """The shortest of several calls of each, taken in turn after one that does not count: other load hits all alike."""
    best = dict.fromkeys(works, float("inf"))
    for repeat in range(repeats + 1):
        for name, work in works.items():
            seconds, _ = timed(work, device)
            if repeat:
                best[name] = min(best[name], seconds)
    return best
