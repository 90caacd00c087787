"""Measures between subspaces: closed forms, invariances, and what chance gives."""

from __future__ import annotations

import math

import pytest
import torch

from curvspace.subspace import (
    cosine_assignment,
    gradient_fraction,
    hessian_gradient_overlap,
    null_overlap,
    orthonormal_basis,
    principal_angles,
    subspace_overlap,
    union_rank,
)


def _random(P: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(P, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_orthonormal_basis_spans_the_same_and_drops_what_depends():
    V = _random(20, 3)
    Q = orthonormal_basis(torch.cat([V, V[:, :1] + V[:, 1:2], torch.zeros(20, 1).double()], dim=1))
    assert Q.shape == (20, 3)
    torch.testing.assert_close(Q.T @ Q, torch.eye(3).double())
    torch.testing.assert_close(Q @ (Q.T @ V), V)
    assert orthonormal_basis(Q) is Q


def test_gradient_fraction():
    Q = torch.eye(5, dtype=torch.float64)[:, :2]
    g = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]).double()
    assert gradient_fraction(g, Q) == pytest.approx(9 / 25)
    assert gradient_fraction(g, 7 * Q @ torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double()) == pytest.approx(9 / 25)
    by_chance = [gradient_fraction(_random(200, 1, s)[:, 0], _random(200, 10, 1000 + s)) for s in range(50)]
    assert sum(by_chance) / 50 == pytest.approx(10 / 200, rel=0.2)


def test_hessian_gradient_overlap():
    H = torch.diag(torch.tensor([3.0, 1.0]))
    assert hessian_gradient_overlap(torch.tensor([2.0, 0.0]), H @ torch.tensor([2.0, 0.0])) == pytest.approx(1)
    assert hessian_gradient_overlap(torch.ones(2), H @ torch.ones(2)) == pytest.approx(4 / (2**0.5 * 10**0.5))


def test_subspace_overlap_and_its_null():
    E = torch.eye(6, dtype=torch.float64)
    assert subspace_overlap(E[:, :2], E[:, :2]) == pytest.approx(1)
    assert subspace_overlap(E[:, :2], E[:, 1:3]) == pytest.approx(1 / 2)
    assert subspace_overlap(E[:, :2], E[:, 2:6]) == pytest.approx(0)
    assert subspace_overlap(E[:, :1], E[:, :4]) == pytest.approx(1 / 2)
    found = [subspace_overlap(_random(100, 4, s), _random(100, 9, 500 + s)) for s in range(40)]
    assert sum(found) / 40 == pytest.approx(null_overlap(4, 9, 100), rel=0.1)


@pytest.mark.parametrize("angle", [1e-9, 0.3, math.pi / 4, 1.5, math.pi / 2])
def test_principal_angles(angle):
    E = torch.eye(6, dtype=torch.float64)
    turned = torch.stack([E[:, 0], math.cos(angle) * E[:, 1] + math.sin(angle) * E[:, 2]], dim=1)
    found = principal_angles(E[:, :2], turned)
    torch.testing.assert_close(found, torch.tensor([0.0, angle]).double(), rtol=1e-6, atol=1e-12)
    assert principal_angles(E[:, :3], E[:, :1]).shape == (1,)


def test_union_rank_depends_on_the_tolerance_and_says_how():
    V = orthonormal_basis(_random(50, 4))
    E = V + 1e-2 * orthonormal_basis(_random(50, 4, 1))
    assert union_rank(V, E, tol=1e-4).rank == 8
    assert union_rank(V, E, tol=1e-1).rank == 4
    rank, singular_values = union_rank(100 * V, V)
    assert rank == 4
    assert singular_values.shape == (8,)
    torch.testing.assert_close(singular_values[:4], torch.full((4,), 2**0.5).double())


def test_cosine_assignment():
    E = orthonormal_basis(_random(40, 3))
    found = cosine_assignment(-2 * E[:, [2, 0, 1]], E, null_samples=20)
    assert found.columns.tolist() == [2, 0, 1]
    assert found.mean == pytest.approx(1)
    assert 0.05 < found.null < 0.5
    assert cosine_assignment(_random(40, 4), E).columns.eq(-1).sum() == 1


@pytest.mark.parametrize("scale", [1.0, 1e-24, 1e-38, 1e30])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_the_share_of_a_gradient_of_any_size_and_type(scale, dtypes):
    torch.manual_seed(0)
    g, Q = torch.randn(200).double(), torch.randn(200, 3).double()
    q = torch.linalg.qr(Q)[0]
    expected = float((q.T @ g).square().sum() / g.square().sum())
    assert gradient_fraction((g * scale).to(dtypes[0]), Q.to(dtypes[1])) == pytest.approx(expected, rel=1e-4)
    assert gradient_fraction(g.to(dtypes[0]), (scale * Q).to(dtypes[1])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_measures_of_16_bits_are_those_of_their_values(dtype):
    torch.manual_seed(0)
    g, Q, E = (torch.randn(200, k).to(dtype) for k in (1, 3, 4))
    wide = [x.double() for x in (g[:, 0], Q, E)]
    assert gradient_fraction(g[:, 0], Q) == pytest.approx(gradient_fraction(wide[0], wide[1]), rel=1e-4)
    assert subspace_overlap(Q, E) == pytest.approx(subspace_overlap(*wide[1:]), rel=1e-4)
    torch.testing.assert_close(principal_angles(Q, E).double(), principal_angles(*wide[1:]), rtol=1e-4, atol=1e-4)
    assert orthonormal_basis(Q).shape == (200, 3)
