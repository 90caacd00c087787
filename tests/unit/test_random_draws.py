"""Models and losses that draw at random are refused, whichever generator they draw from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective
from tests.unit.small_networks import Fn, minibatch, mlp


class NoisyLoss(nn.Module):
    def forward(self, z, y):
        return F.cross_entropy(z * torch.empty_like(z).uniform_(0.9, 1.1), y)


RANDOM_LOSSES = {
    "noise": lambda z, y: F.cross_entropy(z + 0.5 * torch.randn_like(z), y),
    "dropout": lambda z, y: F.cross_entropy(F.dropout(z, 0.3), y),
    "a sample of the examples": lambda z, y: F.cross_entropy(z[(i := torch.randperm(len(z))[:6])], y[i]),
    "module": NoisyLoss(),
}


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "hessian_by_differences", "empirical_fisher"])
@pytest.mark.parametrize("loss", RANDOM_LOSSES.values(), ids=RANDOM_LOSSES.keys())
def test_a_loss_that_draws_at_random_is_refused(loss, kind):
    objective = Objective(mlp(), [minibatch(12), minibatch(5)], loss)
    with pytest.raises(
        RuntimeError, match=r"the loss \S+ is not deterministic: two evaluations of the same 12 outputs"
    ):
        getattr(objective, kind)()


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), random.random, np.random.random], ids=["torch", "python", "numpy"]
)
@pytest.mark.parametrize("effect", [1.0, 0.0])
def test_a_layer_that_some_draws_leave_out(draw, effect):
    """Two seeds may draw alike by chance."""

    def forward(s, x):
        z = s.head(x)
        return z + effect * torch.tanh(z) if draw() > 0.3 else z

    torch.manual_seed(0)
    objective = Objective(Fn(forward, head=nn.Linear(4, 3)).double(), [minibatch()])
    if not effect:  # what is drawn need not matter
        objective.hessian()
        return
    with pytest.raises(RuntimeError, match="Fn is not deterministic"):
        objective.hessian()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_some_draws_break(value):
    def forward(s, x):
        z = s.head(x)
        return z.masked_fill(torch.rand(()) > 0.3, value)

    with pytest.raises(RuntimeError, match="Fn is not deterministic"):
        Objective(Fn(forward, head=nn.Linear(4, 3)).double(), [minibatch()]).hessian()


def test_outputs_without_finite_entries_are_no_draws():
    """A class that is ruled out by a logit of minus infinity."""

    def forward(s, x):
        z = s.head(x)
        return torch.cat([z, z.new_full((len(z), 1), -float("inf"))], dim=1)

    model, (x, y) = Fn(forward, head=nn.Linear(4, 3)).double(), minibatch()
    v = torch.ones(15).double()
    expected = Objective(model.head, (x, y)).hessian() @ v
    torch.testing.assert_close(Objective(model, (x, y)).hessian() @ v, expected)
