"""Inputs that are no plain tensors: named tuples, sparse matrices, packed sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.curvature import dense_matrix
from tests.unit.small_networks import minibatch


class Fields(nn.Module):
    """Reads its inputs, or one of them, by name."""

    def __init__(self, nested: bool):
        super().__init__()
        self.nested, self.layer = nested, nn.Linear(4, 3)

    def forward(self, first, scale):
        x = first.x * first.mask if self.nested else first
        return self.layer(x) * scale


class Inner(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


class Outer(NamedTuple):
    first: Any
    scale: torch.Tensor


class Labels(NamedTuple):
    classes: torch.Tensor
    weights: np.ndarray | torch.Tensor


def _weighted(outputs, targets):
    losses = F.cross_entropy(outputs, targets.classes, reduction="none")
    return (losses * targets.weights).mean()


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("nested", [False, True])
def test_named_tuples_keep_their_names(nested, n):
    torch.manual_seed(0)
    model = Fields(nested).double()
    x, y = minibatch(n)
    mask, scale, weights = torch.rand(n, 4).double(), torch.full((), 2.0).double(), torch.rand(n).double()
    inputs = Outer(Inner(x, mask) if nested else x * mask, scale)
    objective = Objective(model, [(inputs, Labels(y, weights.numpy()))], _weighted, microbatch="auto")

    def doubled(z, y):
        return _weighted(2 * z, Labels(y, weights))

    linear = Objective(nn.Sequential(model.layer), [((x * mask,), y)], doubled, microbatch=None)
    assert objective.loss() == pytest.approx(linear.loss())
    torch.testing.assert_close(objective.gradient(), linear.gradient())
    torch.testing.assert_close(dense_matrix(objective.hessian()), dense_matrix(linear.hessian()))
    classes = Objective(model, [(inputs, y)])
    assert classes.loss() == pytest.approx(F.cross_entropy(model(*inputs), y).item())
    single = class_gradients(model, inputs, y, 3)[0]
    torch.testing.assert_close(single, class_gradients(model, tuple(inputs), y, 3)[0])


class Graph(nn.Module):
    """A layer whose examples are joined by a sparse matrix: an attribute, a buffer, or an input."""

    def __init__(self, place: str, adjacency: torch.Tensor):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        if place == "attribute":
            self.adjacency = adjacency
        if place == "buffer":
            self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        return (self.adjacency if adjacency is None else adjacency) @ self.layer(x)


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("place", ["attribute", "buffer", "input"])
@pytest.mark.parametrize("n", [12, 300])
def test_sparse_tensors(place, layout, n):
    torch.manual_seed(0)
    dense = torch.rand(n, n).double() * (torch.rand(n, n) < 0.1)
    adjacency = getattr(dense, layout)()
    model, reference = (Graph(place, a).double() for a in (adjacency, dense))
    reference.layer.load_state_dict(model.layer.state_dict())
    x, y = minibatch(n)
    objective, expected = (
        Objective(m, [((x, a) if place == "input" else x, y)]) for m, a in ((model, adjacency), (reference, dense))
    )
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    assert objective.loss() == pytest.approx(expected.loss())
    torch.testing.assert_close(objective.gradient(), expected.gradient())
    for kind in ("hessian", "gauss_newton"):
        torch.testing.assert_close(getattr(objective, kind)() @ v, getattr(expected, kind)() @ v)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.h = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, packed):
        return self.h(self.r(packed)[1][-1])


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: (p,), lambda p: {"packed": p}])
def test_a_packed_sequence_is_one_input(wrap, sort):
    torch.manual_seed(0)
    lengths, y, model = sorted([3, 5, 2, 5, 1, 4, 2, 3], reverse=True), torch.randint(2, (8,)), Packed().double()
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3).double() for n in lengths], enforce_sorted=sort)
    objective = Objective(model, [(wrap(packed), y)], batched=() if sort else None)
    v = torch.randn(objective.num_parameters).double()
    assert objective.loss() == pytest.approx(F.cross_entropy(model(packed), y).item())
    expected = objective.hessian_by_differences() @ v
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
