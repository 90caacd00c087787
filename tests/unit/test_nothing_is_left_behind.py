"""Work that is done again and again does not fill the memory: no tensor is left of what was asked for and dropped."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvspace.curvature import eigsh, gram_eigh, hutchpp, projected_gauss_newton, spectral_density
from curvspace.curvature.class_gradients import class_gradients
from curvspace.curvature.tracker import SubspaceTracker
from curvspace.landscape import LossScanner
from curvspace.monitor import CurvatureMonitor
from curvspace.objective import Objective
from curvspace.optim import build
from curvspace.optim.registry import KINDS


def network() -> nn.Module:
    """Of layers that keep their own results for the backward pass: tanh, softmax, sigmoid, pooling, normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(27, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, 6), nn.Sigmoid()),
        *(nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 3)),
    )


X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def of_objective(method: str, batch_norm: str, microbatch: int | None = None) -> Callable[[], object]:
    def work() -> object:
        objective = Objective(network(), [(X, Y)], batch_norm=batch_norm, microbatch=microbatch)  # type: ignore[arg-type]
        operator: Any = getattr(objective, method)()
        if isinstance(operator, Tensor):
            return operator
        v = torch.ones(operator.shape[1])
        return operator @ v, operator @ torch.stack([v, v], 1)

    return work


def pairs() -> object:
    return eigsh(Objective(network(), [(X, Y)]).hessian(), 2)


def tracked() -> object:
    tracker = SubspaceTracker(2)
    return [tracker.update(Objective(network(), [(X, Y)]).hessian()) for _ in range(2)]


def others() -> object:
    objective = Objective(network().eval(), [(X, Y)])
    H, G = objective.hessian(), objective.gauss_newton()
    v = torch.ones(H.shape[0])
    return [
        spectral_density(H, probes=1, steps=5),
        hutchpp(H, products=6),
        gram_eigh(G),
        objective.empirical_fisher() @ v,
        objective.hessian_by_differences() @ v,
        [layer.hessian() @ torch.ones(layer.num_parameters) for layer in objective.layers().values()],
        projected_gauss_newton(network().eval(), X, Y, "cross_entropy", v[:, None] / v.norm()),
        LossScanner(objective).along(v, [0.0, 0.1]),
    ]


def monitored() -> object:
    with CurvatureMonitor(network().eval(), [(X, Y)], k=2, num_classes=3, to=[]) as monitor:
        return [monitor.measure(step) for step in range(3)]


def step_of(kind: str) -> Callable[[], object]:
    given: dict[str, dict[str, Any]] = {
        "span-filter": {"base": {"kind": "sgd"}, "spans": ["mean-directions", "class-gradients"]},
        "negative-curvature": {"base": "SGD"},
    }

    whole_matrix = kind == "levenberg-marquardt"  # so many products a step as there are parameters

    def work() -> object:
        model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)) if whole_matrix else network().eval()
        optimizer = build(kind, given.get(kind, {}), model, 3, 0.01)
        return [float(optimizer.step(X, Y)) for _ in range(3)]

    return work


WORK: dict[str, Callable[[], object]] = {
    **{
        f"{m}, {bn}": of_objective(m, bn)
        for m in ("gradient", "hessian", "gauss_newton")
        for bn in ("batch", "running")
    },
    "hessian in parts": of_objective("hessian", "running", 5),
    "class gradients": lambda: class_gradients(network().eval(), X, Y, 3),
    "class gradients, one pass each": lambda: class_gradients(network(), X, Y, 3, "vjp"),
    "eigenpairs": pairs,
    "tracked eigenpairs": tracked,
    "all the rest": others,
    "monitor": monitored,
    **{f"step of {kind}": step_of(kind) for kind in KINDS if kind != "muon"},
}


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", WORK)
def test_no_tensor_is_left(name: str) -> None:
    WORK[name]()
    WORK[name]()  # what is kept once, is kept by now
    before = tensors()
    for _ in range(3):
        WORK[name]()
    assert tensors() <= before
