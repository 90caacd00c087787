"""Second derivatives of batch normalisation, written out, against differences, torch's own, and another precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curvspace.curvature.second_order import SecondOrderLayers

EPS = 1e-3
modes = pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
shapes = pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (3, 3, 4, 2), (2, 3, 2, 3, 2)], ids=str)
Norm = Callable[..., Tensor]


def batch_norm(*args, **options):
    with SecondOrderLayers():
        return F.batch_norm(*args, **options)


def _problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """x, weight, bias; a cotangent of y; directions in all of them. One weight is zero, x is off centre."""
    torch.manual_seed(0)
    where = [2 * torch.randn(shape) + 1, torch.tensor([0.0, 1.3, -0.7]), torch.randn(3)]
    directions = [torch.randn_like(t) for t in where]
    return [t.to(dtype) for t in where], torch.randn(shape).to(dtype), [t.to(dtype) for t in directions]


def _statistics(like: Tensor, stored: bool = True) -> tuple[Tensor | None, Tensor | None]:
    return (like.new_tensor([0.5, -1.0, 2.0]), like.new_tensor([0.7, 2.0, 1.0])) if stored else (None, None)


def _gradient(norm: Norm, where: list[Tensor], g: Tensor, training: bool, stored: bool = True) -> list[Tensor]:
    """Of <tanh(y), g>, which depends on y in second order."""
    x, w, b = where
    y = norm(x, *_statistics(x, stored), w, b, training, 0.1, EPS)
    return list(torch.autograd.grad((torch.tanh(y) * g).sum(), where, create_graph=True))


def _product(norm: Norm, where: list[Tensor], g: Tensor, v: list[Tensor], training: bool) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in where]
    inner = sum((p * q).sum() for p, q in zip(_gradient(norm, leaves, g, training), v, strict=True))
    return list(torch.autograd.grad(inner, leaves))


@modes
@shapes
def test_product_is_the_difference_of_gradients(shape, training):
    where, g, v = _problem(shape)
    step = 1e-5
    sides = []
    for sign in (1, -1):
        moved = [(t + sign * step * d).requires_grad_() for t, d in zip(where, v, strict=True)]
        sides.append(_gradient(F.batch_norm, moved, g, training))
    for found, up, down in zip(_product(batch_norm, where, g, v, training), *sides, strict=True):
        expected = ((up - down) / (2 * step)).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * max(1, float(expected.abs().max())))


@modes
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_in_float32_it_is_as_exact_as_torch(scale, training):
    where, g, v = _problem((64, 3, 8, 8), torch.float32)
    where[0] = scale * where[0]
    double = [[t.double() for t in ts] for ts in (where, v)]
    exact = _product(F.batch_norm, double[0], g.double(), double[1], training)
    ours, theirs = (_product(norm, where, g, v, training) for norm in (batch_norm, F.batch_norm))
    for a, b, c in zip(exact, ours, theirs, strict=True):
        floor = 1e-6 * float(a.norm())
        assert float((b - a).norm()) <= 2 * float((c - a).norm()) + floor


@modes
def test_without_weights_and_without_stored_statistics(training):
    (x, _, _), g, (v, _, _) = _problem((5, 3, 2))
    found = []
    for norm in (batch_norm, F.batch_norm):
        leaf = x.clone().requires_grad_()
        y = norm(leaf, *_statistics(x, not training), None, None, training, 0.1, EPS)
        (gradient,) = torch.autograd.grad((torch.tanh(y) * g).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad((gradient * v).sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_running_statistics_are_updated_as_by_torch():
    (x, w, b), *_ = _problem((5, 3, 2))
    ours, theirs = ([t.clone() for t in _statistics(x)] for _ in range(2))
    torch.testing.assert_close(batch_norm(x, *ours, w, b, True), F.batch_norm(x, *theirs, w, b, True))
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], _statistics(x)[0])


def test_the_layers_take_it_and_refuse_a_third_derivative():
    layer = torch.nn.BatchNorm1d(3).double()
    (x, _, _), g, (v, _, _) = _problem((5, 3))
    with SecondOrderLayers():
        y = layer(x.requires_grad_())
    assert type(y.grad_fn).__name__ == "_BatchNormBackward"
    (gradient,) = torch.autograd.grad((torch.tanh(y) * g).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once more"):
        torch.autograd.grad((gradient * v).sum(), x, create_graph=True)


def test_other_types_and_impossible_batches_are_torchs_own():
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    weight = torch.ones(3)
    torch.testing.assert_close(
        batch_norm(x, torch.zeros(3), torch.ones(3), weight), F.batch_norm(x, torch.zeros(3), torch.ones(3), weight)
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.randn(1, 3), None, None, training=True)
