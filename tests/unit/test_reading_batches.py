"""Reading iterables and loaders of batches: memory used again, generators left alone, single examples refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective
from curvspace.monitor import CurvatureMonitor
from tests.unit.small_networks import minibatch, mlp


def _reusing(change):
    """Two batches in the same memory."""

    def loader(x, y):
        a, b = torch.empty(6, 4).double(), torch.empty(6).long()
        for part in (slice(0, 6), slice(6, 12)):
            yield change(a, b, x[part], y[part])

    return loader


def _in_place(a, b, x, y):
    return a.copy_(x), b.copy_(y)


def _one_row(a, b, x, y):
    a[3] = x[3]
    return a, y


def _without_versions(a, b, x, y):
    a.data.copy_(x)
    return a, y


def _arrays(a, b, x, y):
    return a.copy_(x).numpy(), y.numpy()


def _mapping(a, b, x, y):
    return {"input": a.copy_(x), "labels": y}


@pytest.mark.parametrize("change", [_in_place, _one_row, _without_versions, _arrays, _mapping])
def test_an_iterable_that_uses_its_memory_again(change):
    with pytest.raises(ValueError, match="batch 0 was overwritten while later ones were read"):
        Objective(mlp(), _reusing(change)(*minibatch(12)))


def test_an_iterable_may_yield_the_same_or_views_of_one_tensor():
    model, (x, y) = mlp(), minibatch(12)
    x[0, 0] = float("nan")
    assert len(Objective(model, ((x, y) for _ in range(2))).batches) == 2
    x[0, 0] = 1
    views = Objective(model, ((x[i : i + 5], y[i : i + 5].numpy()) for i in (0, 5, 10)))
    assert views.loss() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-12)


class Augmented(torch.utils.data.Dataset):
    """Draws from all generators."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(4).double() + random.random() + np.random.rand(), i % 3  # noqa: NPY002


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("read", [Objective, CurvatureMonitor])
def test_reading_a_loader_draws_nothing(read, shuffle, seeded):
    own = torch.Generator().manual_seed(5) if seeded else None
    loader = torch.utils.data.DataLoader(Augmented(), 5, shuffle=shuffle, generator=own)

    def states():
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            own.get_state().tolist() if own else None,
        ]

    model = mlp()
    before = states()
    read(model, loader)
    assert states() == before


@pytest.mark.parametrize("read", [Objective, CurvatureMonitor])
def test_reading_a_loader_with_a_batch_sampler_draws_nothing_from_its_generator(read):
    own, data = torch.Generator().manual_seed(5), Augmented()
    order = torch.utils.data.RandomSampler(data, generator=own)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=torch.utils.data.BatchSampler(order, batch_size=5, drop_last=False)
    )
    before = own.get_state()
    read(mlp(), loader)
    assert torch.equal(own.get_state(), before)


def _same_width() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)).double()


ONE_BY_ONE = {
    "linear": (lambda: nn.Linear(4, 4).double(), "mse"),
    "layers": (_same_width, "mse"),
    "torch's": (_same_width, nn.HuberLoss()),
    "a callable": (_same_width, lambda z, y: (z - y).square().mean()),
    "padding": (lambda: nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.Linear(6, 4)).double(), "mse"),
}


@pytest.mark.parametrize(("make", "loss"), ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
def test_examples_one_by_one_are_not_taken_for_batches(make, loss):
    model, (x, _) = make(), minibatch()
    for batches in ([(a, a) for a in x], (x[0], x[0]), [((a,), a) for a in x]):
        with pytest.raises(ValueError, match=r"batch 0, inputs \(4,\) and targets \(4,\), seems to be one example"):
            Objective(model, batches, loss)
    together = Objective(model, [(a[None], a[None]) for a in x], loss)
    assert together.loss() == pytest.approx(Objective(model, (x, x), loss).loss(), abs=1e-12)


class Curve(nn.Module):
    """Takes numbers, one an example."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x):
        return self.inner(x[:, None])[:, 0]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_batches_of_numbers(n):
    model, x = Curve(), torch.randn(n).double()
    expected = 0.5 * (model(x) - x).square().mean().item()
    assert Objective(model, (x, x), "mse").loss() == pytest.approx(expected, abs=1e-12)


def test_a_model_of_a_fixed_number_of_inputs_is_taken_at_the_users_word():
    model, x = nn.Linear(4, 4).double(), torch.randn(4).double()
    expected = 0.5 * (model(x) - x).square().sum().item() / 4
    assert Objective(model, (x, x), "mse", batched=[0]).loss() == pytest.approx(expected, abs=1e-12)
    assert Objective(model, (x, x), "mse", batched=()).loss() == pytest.approx(expected, abs=1e-12)
