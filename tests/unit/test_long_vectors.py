"""Networks of real size: sums over 12 million entries in float32, against the same in float64.

A plain float32 sum of so many is off by 1e-3 to 2e-2 on a CPU, and a cutoff that grows with P swallows every direction.
"""

from __future__ import annotations

import math

import pytest
import torch

from curvspace import eigsh
from curvspace.curvature.trace import hutchpp
from curvspace.inner import PIECE, inner, norm
from curvspace.landscape import plane_through
from curvspace.optim.span import orthonormal_span, symmetric_span
from curvspace.subspace import (
    cosine_assignment,
    gradient_fraction,
    hessian_gradient_overlap,
    orthonormal_basis,
    principal_angles,
    subspace_overlap,
    union_rank,
)

P = 12_000_000


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    """(P, 3), at angles of 30 to 80 degrees to each other, lengths 1e-3 to 1e3."""
    torch.manual_seed(0)
    drawn = torch.randn(P, 3)
    drawn[:, 1] += 0.7 * drawn[:, 0]
    drawn[:, 2] += 0.2 * drawn[:, 1]
    return drawn * torch.tensor([1e-3, 1.0, 1e3]) / P**0.5


@pytest.fixture(scope="module")
def exact(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double()


def close(found: object, expected: object, relative: float = 2e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=relative, atol=relative
    )


def test_inner_products_and_lengths(vectors, exact):
    close(inner(vectors, vectors), exact.T @ exact)
    close(inner(vectors, vectors[:, 1]), exact.T @ exact[:, 1])
    close(inner(vectors[:, 0], vectors[:, 2]), exact[:, 0] @ exact[:, 2])
    close(norm(vectors), exact.norm(dim=0))
    assert inner(vectors, vectors).dtype == torch.float32
    assert float((vectors.T @ vectors - exact.T @ exact).abs().max() / (exact.T @ exact).max()) > 1e-4  # why they exist


@pytest.mark.parametrize("rows", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_the_pieces_meet_at_their_ends(rows):
    a, b = torch.randn(rows, 2, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    torch.testing.assert_close(inner(a, b), a.T @ b)
    torch.testing.assert_close(norm(a), a.norm(dim=0))
    torch.testing.assert_close(norm(a[:, 0]), a[:, 0].norm())


def test_no_direction_is_lost_and_all_are_orthonormal(vectors):
    basis = orthonormal_basis(vectors)
    assert basis.shape == (P, 3)
    gram = inner(basis, basis, torch.float64)
    assert float((gram - torch.eye(3)).abs().max()) < 1e-5
    twice = orthonormal_basis(torch.cat([vectors, vectors[:, :1] + 1e-3 * vectors[:, 1:2]], dim=1))
    assert twice.shape == (P, 3)  # the fourth is in the span of the first two


def test_shares_overlaps_and_angles(vectors, exact):
    g, Q = vectors[:, 2], vectors[:, :2]
    q = torch.linalg.qr(exact[:, :2])[0]
    close(gradient_fraction(g, Q), (q.T @ exact[:, 2]).square().sum() / exact[:, 2].square().sum())
    cosine = exact[:, 0] @ exact[:, 1] / exact[:, 0].norm() / exact[:, 1].norm()
    close(hessian_gradient_overlap(vectors[:, 0], vectors[:, 1]), cosine)
    close(subspace_overlap(vectors[:, :1], vectors[:, 1:2]), cosine**2)
    close(principal_angles(vectors[:, :1], vectors[:, 1:2])[0], math.acos(float(cosine)))
    near = vectors[:, :1] + 1e-6 * vectors[:, 1:2]  # an angle of 7e-4
    tangent = 1e-6 * exact[:, 1] - exact[:, 0] * (1e-6 * exact[:, 1] @ exact[:, 0] / exact[:, 0].square().sum())
    close(principal_angles(vectors[:, :1], near)[0], tangent.norm() / exact[:, 0].norm(), relative=2e-6)
    close(cosine_assignment(vectors[:, :1], vectors[:, 1:2]).mean, cosine)
    assert union_rank(vectors[:, :1], vectors[:, 1:2]).rank == 2
    assert union_rank(vectors[:, :2], vectors[:, :2]).rank == 2


@pytest.mark.parametrize("span", [orthonormal_span, symmetric_span])
def test_spans_of_optimisers_are_orthonormal(vectors, span):
    rows = vectors.T.contiguous()
    Q = (span([rows]) if span is orthonormal_span else span(rows)).matrix()
    assert float((inner(Q, Q, torch.float64) - torch.eye(3)).abs().max()) < 1e-5


class Diagonal:
    """A symmetric operator with five large eigenvalues above noise in [0, 1]."""

    shape, dtype, device, deterministic = (P, P), torch.float32, torch.device("cpu"), True

    def __init__(self) -> None:
        self.diagonal = torch.rand(P)
        self.diagonal[:5] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return (self.diagonal * v.mT).mT if v.ndim == 2 else self.diagonal * v


def test_eigenpairs_of_a_large_operator():
    torch.manual_seed(0)
    A = Diagonal()
    pairs = eigsh(A, 3, tol=1e-3, max_basis=12)
    close(pairs.values, [9.0, 8.0, 7.0], relative=1e-5)
    gram = inner(pairs.vectors, pairs.vectors, torch.float64)
    assert float((gram - torch.eye(3)).abs().max()) < 3e-5
    residual = (A @ pairs.vectors).double() - pairs.vectors.double() * pairs.values.double()
    assert (residual.norm(dim=0) <= 1.1e-3 * pairs.values).all()


def test_the_trace_of_a_large_operator():
    torch.manual_seed(0)
    A = Diagonal()
    found = hutchpp(A, products=6)
    assert abs(found.value - float(A.diagonal.double().sum())) < 5 * found.standard_error + 1e-3 * found.value


def test_the_plane_through_three_points_of_a_large_network(exact):
    points = torch.cat([torch.zeros(1, P), exact[:, 1:].T.float()])
    u, v, coordinates = plane_through(points)
    frame = torch.stack([u, v], dim=1)
    assert float((inner(frame, frame, torch.float64) - torch.eye(2)).abs().max()) < 1e-5
    close(coordinates[1], [float(exact[:, 1].norm()), 0.0])
    close(coordinates[2].norm(), exact[:, 2].norm())
