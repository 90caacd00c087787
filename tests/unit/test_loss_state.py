"""What a loss keeps of the batches moves once a step of any optimiser, as with the gradient alone, never otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import LossScanner, Objective
from curvspace.losses import get_loss
from curvspace.optim import CurveBall, FirstOrder, SpanFilter
from curvspace.optim.registry import KINDS, build

N = 24


class Network(nn.Module):
    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.inside = nn.Linear(4, 5), nn.Linear(5, 3), inside or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.inside(self.a(x))))


def _batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)) for _ in range(n)]


class Averaging(nn.Module):
    """Cross-entropy of outputs from which their running mean is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * z.detach().mean(0))
        self.seen.append(y.float().mean())
        return F.cross_entropy((1 + self.mean.sum()) * z - self.mean, y)

    def held(self) -> list[Tensor]:
        return [torch.tensor(self.calls), self.mean.clone(), *self.seen]


class Plain:
    """The same in an object that is no module, with its mean replaced."""

    def __init__(self) -> None:
        self.calls, self.seen, self.mean = 0, [], torch.zeros(3)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        self.calls += 1
        self.seen.append(y.float().mean())
        return F.cross_entropy((1 + self.mean.sum()) * z - self.mean, y)

    held = Averaging.held


class Trainer:
    def __init__(self) -> None:
        self.criterion, self.steps = Averaging(), 0

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        self.steps += 1
        return self.criterion(z, y)


def _module() -> tuple[Any, Callable[[], list[Tensor]]]:
    loss = Averaging()
    return loss, loss.held


def _object() -> tuple[Any, Callable[[], list[Tensor]]]:
    loss = Plain()
    return loss, loss.held


def _around() -> tuple[Any, Callable[[], list[Tensor]]]:
    calls, seen, mean = 0, [], torch.zeros(3)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        nonlocal calls, mean
        calls += 1
        mean = 0.9 * mean + 0.1 * z.detach().mean(0)
        seen.append(y.float().mean())
        return F.cross_entropy((1 + mean.sum()) * z - mean, y)

    return loss, lambda: [torch.tensor(calls), mean, *seen]


def _trainer() -> tuple[Any, Callable[[], list[Tensor]]]:
    trainer = Trainer()
    return trainer.loss, lambda: [torch.tensor(trainer.steps), *trainer.criterion.held()]


def _given() -> tuple[Any, Callable[[], list[Tensor]]]:
    held = [Plain()]
    return partial(lambda z, y, by: by[0](z, y), by=held), held[0].held


LOSSES = {"module": _module, "object": _object, "closure": _around, "trainer": _trainer, "partial": _given}


def _sgd(model: nn.Module, loss: Any) -> Any:
    return FirstOrder(model, torch.optim.SGD, loss, lr=0.05)


def _filtered(kind: Any, **options: Any) -> Callable[..., Any]:
    return lambda model, loss: SpanFilter(kind(model.parameters(), **options), model, 3, loss=loss, refresh_every=1)


def _built(kind: str, **options: Any) -> Callable[..., Any]:
    return lambda model, loss: build(kind, options, model, 3, 0.05, loss, seed=0)


OPTIMISERS: dict[str, Callable[..., Any]] = {
    **{kind: _built(kind) for kind in KINDS if kind not in ("muon", "span-filter")},
    "a Hessian in the span": _built("class-gradient-newton", estimate="hessian"),
    "one pass a class": _built("class-gradient-newton", algorithm="vjp"),
    "adaptive damping": _built("rayleigh-ritz-newton", damping="adaptive"),
    "rates given": _built("curveball", rho=0.9, beta=0.1),
    "LBFGS": lambda model, loss: FirstOrder(model, torch.optim.LBFGS, loss, max_iter=4),
    "filter": _filtered(torch.optim.SGD, lr=0.05),
    "filter, LBFGS": _filtered(torch.optim.LBFGS, max_iter=4),
}


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_once_a_step(name: str, form: str) -> None:
    batches, model = _batches(6 if name == "adaptive damping" else 3), Network()
    loss, held = LOSSES[form]()
    optimizer = OPTIMISERS[name](model, loss)
    for i, (x, y) in enumerate(batches):
        before, outputs = held(), model(x).detach()
        optimizer.step(x, y)
        once, of_once = LOSSES["module"]()
        once.mean.copy_(before[-i - 1 if i else -1])  # the mean lies before what was seen
        once(outputs, y)
        torch.testing.assert_close(held()[-2 - i], of_once()[1])
        assert int(held()[0]) == i + 1
        assert len(held()) == len(before) + 1


@pytest.mark.filterwarnings("ignore:.*autograd's gradient is not the derivative")
@pytest.mark.parametrize("form", LOSSES)
def test_never_by_a_look(form: str) -> None:
    (x, y), model = _batches(1)[0], Network().double()
    loss, held = LOSSES[form]()
    if form == "module":
        loss.double()
    objective = Objective(model, (x, y), loss, dtype=torch.float64)
    mean = 0.1 * model(x.double()).detach().mean(0)
    fixed = Objective(model, (x, y), lambda z, y: F.cross_entropy((1 + mean.sum()) * z - mean, y), dtype=torch.float64)
    v = torch.ones(objective.num_parameters).double()
    torch.testing.assert_close(objective.hessian() @ v, fixed.hessian_by_differences() @ v, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(objective.gauss_newton() @ v, fixed.gauss_newton() @ v)
    assert LossScanner(objective).along(v, [0.0])[0] == pytest.approx(fixed.loss())
    assert objective.loss() == objective.loss()
    assert int(held()[0]) == 0
    assert len(held()) == 2 + (form == "trainer")


def test_a_loss_of_torchs_base_class_that_sums_has_a_state() -> None:
    class Summing(nn.modules.loss._Loss):
        calls = 0

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(z, y, reduction="sum")

    (x, y), loss = _batches(1)[0], Summing(reduction="sum")
    Objective(Network(), (x, y), loss).loss()
    assert loss.calls == 0
    CurveBall(Network(), loss).step(x, y)
    assert loss.calls == 1
    assert not get_loss(nn.L1Loss()).stateful


def _drawing(z: Tensor, y: Tensor) -> Tensor:
    return (torch.rand(z.shape) * (z - F.one_hot(y, 3)).square()).sum(1).mean()


@pytest.mark.parametrize(
    "name", ["curveball", "rates given", "class-gradient-newton", "rayleigh-ritz-newton", "filter"]
)
def test_a_loss_that_draws_draws_once_a_step(name: str) -> None:
    (x, y), states = _batches(1)[0], []
    for make in (_sgd, OPTIMISERS[name]):
        torch.manual_seed(7)
        model = Network()
        torch.manual_seed(7)
        make(model, _drawing).step(x, y)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_draws_of_one_step_are_those_of_one_function() -> None:
    (x, y), ends = _batches(1)[0], []
    torch.manual_seed(7)
    mask = torch.rand(N, 3)
    for loss in (_drawing, lambda z, y: (mask * (z - F.one_hot(y, 3)).square()).sum(1).mean()):
        model = Network()
        optimizer = CurveBall(model, loss)
        torch.manual_seed(7)
        optimizer.step(x, y)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


def test_running_statistics_and_the_loss_move_as_by_sgd() -> None:
    (x, y), ends = _batches(1)[0], []
    for name in ("sgd", "levenberg-marquardt"):
        model, loss = Network(nn.BatchNorm1d(5)), Averaging()
        OPTIMISERS[name](model, loss).step(x, y)
        ends.append((model.inside.running_mean, loss.mean))
    torch.testing.assert_close(*ends)


def test_objects_that_others_work_on_are_left_alone() -> None:
    class Writer:
        def __init__(self) -> None:
            self.lock, self.lines = threading.Lock(), []

    writer, lines = Writer(), []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        with writer.lock:
            writer.lines.append(1)
        lines.append(writer.lines)
        return F.cross_entropy(z, y)

    kept = writer.lines
    Objective(Network(), _batches(1)[0], loss).loss()
    assert writer.lines is kept
    assert kept  # what other threads share is not exchanged
    assert not lines
