"""Losses that read beside the outputs what a call of the model leaves behind: an auxiliary loss, features of a hook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective
from curvspace.functional import parameter_vector
from curvspace.optim import CurveBall, class_gradient_newton, rayleigh_ritz_newton
from tests.unit.small_networks import Fn, minibatch

LossLike = Callable[[Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Two of three experts an example, gathered by ``index_add``; how even their load is lies in ``balance``."""

    def __init__(self, start: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        if start == "even":
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        top, chosen = shares.topk(2)
        z = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            row, place = torch.where(chosen == k)
            z = z.index_add(0, row, expert(x[row]) * top[row, place, None])
        self.balance = (shares.mean(0) * F.one_hot(chosen[:, 0], 3).to(x).mean(0)).sum()
        self.size = shares.square().mean()
        return z


def by_attribute(model: Experts) -> LossLike:
    return lambda z, y: F.cross_entropy(z, y) + model.balance


def by_hook(model: Experts) -> LossLike:
    features: dict[str, Tensor] = {}
    model.gate.register_forward_hook(lambda module, inputs, output: features.update(gate=output))
    return lambda z, y: F.cross_entropy(z, y) + features["gate"].softmax(1).mean(0).square().sum()


def loss_and_gradient(model: nn.Module, loss: LossLike, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    value = loss(model(x), y)
    gradient = torch.autograd.grad(value, list(model.parameters()))
    return float(value.detach()), torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("start", ["uneven", "even"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("read", [by_attribute, by_hook])
def test_a_batch_is_not_cut_where_what_is_left_behind_is_of_the_whole(read: Callable, called: bool, start: str) -> None:
    model = Experts(start).double()
    loss, (x, y) = read(model), minibatch(300)
    if called:
        model(x[:40])
    with pytest.raises(ValueError, match="microbatch=32 would change the function"):
        Objective(model, [(x, y)], loss, microbatch=32).gradient()
    value, gradient = loss_and_gradient(model, loss, x, y)
    objective = Objective(model, [(x, y)], loss)
    assert objective.loss() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(objective.gradient(), gradient)


@pytest.mark.parametrize("called", [False, True])
def test_it_is_cut_where_that_is_a_mean_over_the_examples(called: bool) -> None:
    model, (x, y) = Experts("uneven").double(), minibatch(300)
    if called:
        model(x[:40])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + model.size

    objective = Objective(model, [(x, y)], loss, microbatch=32)
    assert len(objective.batches) == 10
    value, gradient = loss_and_gradient(model, loss, x, y)
    assert objective.loss() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(objective.gradient(), gradient)


@pytest.mark.parametrize("make", [class_gradient_newton, rayleigh_ritz_newton])
@pytest.mark.parametrize("read", [by_attribute, by_hook])
def test_the_gradient_beside_class_gradients_is_of_the_whole_batch(read: Callable, make: Callable) -> None:
    """From the second step on, when it is known how the model is best split, and when a first phase is over."""
    model, (x, y) = Experts("uneven").double(), minibatch(60)
    whole, first_phase = read(model), True

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) if first_phase else whole(z, y)

    optimizer = make(model, 3, loss=loss, refresh_every=1, lr=0.01)
    for step in range(6):
        first_phase = step < 3
        value, gradient = loss_and_gradient(model, loss, x, y)
        assert float(optimizer.step(x, y)) == pytest.approx(value, rel=1e-12)
        assert float(optimizer.grad_norm) == pytest.approx(float(gradient.norm()), rel=1e-9)


@pytest.mark.parametrize("read", [by_attribute, by_hook])
def test_curveball_which_differentiates_by_the_outputs_alone_refuses_it(read: Callable) -> None:
    model, (x, y) = Experts("uneven").double(), minibatch(60)
    model(x)
    whole, first_phase = read(model), True

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) if first_phase else whole(z, y)

    optimizer = CurveBall(model, loss=loss)
    optimizer.step(x, y)
    before, first_phase = parameter_vector(model), False
    with pytest.raises(ValueError, match="what a call of it leaves behind"):
        optimizer.step(x, y)
    assert torch.equal(parameter_vector(model), before)


@pytest.mark.parametrize("number", ["a count", "a mean"])
def test_numbers_among_the_outputs_are_of_the_whole_batch(number: str) -> None:
    """From the second step on, when it is known how the model is best split."""
    experts, (x, y) = Experts("uneven").double(), minibatch(60)

    def forward(s: nn.Module, x: Tensor) -> dict[str, Tensor | float]:
        z = s.experts(x)
        return {"logits": z, "number": len(x) if number == "a count" else z.square().mean().item()}

    def loss(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], y, reduction="sum") / outputs["number"]

    model = Fn(forward, experts=experts)
    optimizer = class_gradient_newton(model, 3, loss=loss, lr=0.01)
    for _ in range(3):
        value, gradient = loss_and_gradient(model, loss, x, y)
        assert float(optimizer.step(x, y)) == pytest.approx(value, rel=1e-12)
        assert float(optimizer.grad_norm) == pytest.approx(float(gradient.norm()), rel=1e-9)
    with pytest.raises(ValueError, match="microbatch=16 would change the function"):
        Objective(model, [(x, y)], loss, microbatch=16).gradient()
