"""Parameters and activations that a model or a loss reaches by references of its own: right, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective, class_gradients
from tests.unit.small_networks import minibatch, mlp


class Held(nn.Module):
    """Reaches some parameters through a plain list."""

    def __init__(self, held: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.ws = list(self.parameters())[:held]

    def forward(self, x: Tensor) -> Tensor:
        parameters = [*self.ws, *list(self.parameters())[len(self.ws) :]]
        return F.linear(torch.tanh(F.linear(x, *parameters[:2])), *parameters[2:])


@pytest.mark.parametrize("held", [1, 4])
@pytest.mark.parametrize(
    "compute",
    [
        lambda model, x, y: Objective(model, (x, y)).gradient(),
        lambda model, x, y: Objective(model, (x, y)).hessian() @ torch.ones(43).double(),
        lambda model, x, y: Objective(model, (x, y)).gauss_newton() @ torch.ones(43).double(),
        lambda model, x, y: class_gradients(model, x, y, 3),
    ],
)
def test_parameters_in_a_list(compute, held):
    torch.manual_seed(0)
    model, (x, y) = Held(held).double(), minibatch(9)
    with pytest.raises(ValueError, match=r"Held.* (use a.weight|depends on none)"):
        compute(model, x, y)
    model.ws = []
    compute(model, x, y)


def test_parameters_used_outside_of_the_call():
    torch.manual_seed(0)
    table, model = nn.Embedding(7, 5).double(), nn.Linear(5, 3).double()
    both = nn.ModuleDict({"table": table, "model": model})
    both.forward = model.forward  # type: ignore[method-assign]
    x = table(torch.randint(7, (9,)))
    with pytest.raises(ValueError, match=r"use table.weight by references kept outside"):
        Objective(both, (x, torch.randint(3, (9,)))).gradient()


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_loss_that_reads_the_parameters(by_reference):
    model, (x, y) = mlp(), minibatch(300)
    held = list(model.parameters())

    def loss(z: Tensor, y: Tensor) -> Tensor:
        parameters = held if by_reference else model.parameters()
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in parameters)

    objective = Objective(model, (x, y), loss)
    if by_reference:
        for compute in (objective.gradient, lambda: objective.hessian() @ torch.ones(43).double()):
            with pytest.raises(ValueError, match="by references kept outside"):
                compute()
        return
    plain, eye = Objective(model, (x, y)), torch.eye(43).double()
    theta = torch.cat([p.detach().flatten() for p in held])
    torch.testing.assert_close(objective.gradient(), plain.gradient() + 0.2 * theta)
    torch.testing.assert_close(objective.hessian() @ eye, plain.hessian() @ eye + 0.2 * eye)
    torch.testing.assert_close(objective.gauss_newton() @ eye, plain.gauss_newton() @ eye + 0.2 * eye)
    G = objective.gauss_newton()
    G.vectors_at_once = 4
    torch.testing.assert_close(G @ eye, plain.gauss_newton() @ eye + 0.2 * eye)
    parts = Objective(model, (x, y), loss, microbatch=50)
    torch.testing.assert_close(parts.hessian() @ eye, plain.hessian() @ eye + 0.2 * eye)


@pytest.mark.parametrize("attribute", [False, True])
def test_a_loss_that_reads_what_forward_keeps(attribute):
    model, (x, y) = mlp(), minibatch()
    model.kept = None if attribute else []

    def keep(_: nn.Module, __: Any, h: Tensor) -> None:
        if attribute:
            model.kept = h
        else:
            model.kept.append(h)

    model[1].register_forward_hook(keep)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + (model.kept if attribute else model.kept[-1]).square().mean()

    objective = Objective(model, (x, y), loss)
    v = torch.randn(43).double()
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
    assert not model.kept
