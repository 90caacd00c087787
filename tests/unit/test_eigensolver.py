"""Eigenpairs against dense eigendecompositions, from both ends, and what happens when there is no answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvspace import Objective, eigsh
from curvspace.curvature import dense_matrix


def _symmetric(n: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (A + A.T) / 2


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix, noise=0.0):
        self.matrix, self.noise = matrix, noise
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.products = 0

    def __matmul__(self, v):
        self.products += 1
        return self.matrix @ v + self.noise * torch.randn_like(v)


class Diagonal:
    """diag(values) as an operator."""

    def __init__(self, values):
        self.values, self.shape = values, (len(values), len(values))
        self.dtype, self.device = values.dtype, values.device

    def __matmul__(self, v):
        return self.values * v


def _expected(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    down = values.flip(0)
    if which == "LA":
        return down[:k]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return torch.cat([down[: (k + 1) // 2], down[len(down) - k // 2 :]])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(("k", "max_basis"), [(1, None), (6, None), (7, 20)])
def test_agrees_with_dense(which, k, max_basis):
    A = _symmetric(120)
    pairs = eigsh(A, k, which, tol=1e-9, max_basis=max_basis, max_products=2000)
    torch.testing.assert_close(pairs.values, _expected(torch.linalg.eigvalsh(A), k, which), rtol=0, atol=1e-10)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k).double(), rtol=0, atol=1e-10)
    true = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-2, atol=1e-11)
    assert pairs.converged


def test_whole_spectrum_and_tiny_operators():
    A = _symmetric(9)
    torch.testing.assert_close(eigsh(A, 9, "SA").values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-12)
    assert eigsh(torch.tensor([[3.0]]), 1).values.tolist() == [3.0]
    assert eigsh(torch.zeros(5, 5), 3).values.tolist() == [0.0] * 3


@pytest.mark.parametrize("copies", [2, 9])
def test_finds_every_copy_of_a_repeated_eigenvalue(copies):
    spectrum = torch.cat([torch.full((copies,), 5.0), torch.linspace(0, 1, 200)]).double()
    q, _ = torch.linalg.qr(_symmetric(len(spectrum)))
    pairs = eigsh(q * spectrum @ q.T, copies + 2, tol=1e-6)
    torch.testing.assert_close(pairs.values[:copies], torch.full((copies,), 5.0).double())
    torch.testing.assert_close(pairs.values[copies], torch.tensor(1.0).double(), rtol=0, atol=1e-6)


def test_a_start_subspace_that_converged_does_not_hide_a_new_eigenvalue():
    spectrum = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.linspace(0, 1, 100)]).double()
    start = torch.eye(len(spectrum), dtype=torch.float64)[:, 1:4]  # the pairs of 8, 7 and 0: exact, but not the largest
    pairs = eigsh(torch.diag(spectrum), 3, v0=start)
    torch.testing.assert_close(pairs.values, spectrum[:3], rtol=1e-5, atol=0)


def test_both_ends_of_an_indefinite_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    H = Objective(model, [(torch.randn(20, 5).double(), torch.randint(3, (20,)))]).hessian()
    values = torch.linalg.eigvalsh(dense_matrix(H))
    assert values[0] < -1e-2 < 1e-2 < values[-1]
    for which in ("LA", "SA", "BE", "LM"):
        pairs = eigsh(H, 4, which, tol=1e-9)
        torch.testing.assert_close(pairs.values, _expected(values, 4, which), rtol=0, atol=1e-10)


def test_a_random_vector_of_a_large_flat_operator_is_not_taken_for_its_negative_end():
    values = torch.zeros(200_000)
    values[:5] = torch.tensor([3.0, 2.0, 1.0, 0.5, -0.4])
    pairs = eigsh(Diagonal(values), 1, "SA", tol=0.02)
    torch.testing.assert_close(pairs.values, torch.tensor([-0.4]), rtol=0.01, atol=0)
    assert pairs.vectors[4, 0].abs() > 0.99


def test_tolerance_relative_to_the_wanted_pairs():
    spectrum = torch.cat([torch.tensor([100.0]), torch.linspace(-0.1, 1, 150)]).double()
    q, _ = torch.linalg.qr(_symmetric(len(spectrum)))
    A = q * spectrum @ q.T
    assert (eigsh(A, 2, "SA").residuals <= 1e-3 * 100).all()
    pairs = eigsh(A, 2, "SA", relative_to="wanted")
    assert (pairs.residuals <= 1.001e-3 * 0.1).all()
    torch.testing.assert_close(pairs.values[0], torch.tensor(-0.1).double(), rtol=1e-4, atol=0)


def test_single_precision():
    A = _symmetric(150)
    pairs = eigsh(A.float(), 5, tol=1e-4)
    assert pairs.values.dtype == torch.float32
    torch.testing.assert_close(pairs.values.double(), torch.linalg.eigvalsh(A).flip(0)[:5], rtol=1e-5, atol=0)


def test_counts_products_and_stops_at_the_budget_with_a_warning():
    A = Counting(_symmetric(300))
    with pytest.warns(RuntimeWarning, match="not converged after 12 products"):
        pairs = eigsh(A, 4, tol=1e-10, max_products=12)
    assert not pairs.converged
    assert pairs.products == A.products == 12
    assert pairs.residuals.max() > 1e-10


def test_is_reproducible_and_reports_progress(capsys):
    A = _symmetric(60)
    first, second = eigsh(A, 3, seed=3), eigsh(A, 3, seed=3, progress=True)
    assert torch.equal(first.vectors, second.vectors)
    assert "product" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be between 1 and P = 6, got 0"),
        ({"k": 7}, "k must be between 1 and P = 6, got 7"),
        ({"k": 2, "which": "XX"}, "which must be"),
        ({"k": 2, "relative_to": "k"}, "relative_to must be"),
        ({"k": 2, "tol": -1.0}, "tol must not be negative"),
        ({"k": 2, "v0": torch.ones(5)}, r"v0 must be \(P,\) or \(P, m\) with P = 6"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigsh(_symmetric(6), **arguments)


def test_operators_that_cannot_be_solved():
    with pytest.raises(RuntimeError, match="not deterministic"):
        eigsh(Counting(_symmetric(50), noise=0.1), 2)
    with pytest.raises(RuntimeError, match="not finite"):
        eigsh(torch.full((4, 4), float("nan")), 2)
    with pytest.raises(ValueError, match="square"):
        eigsh(torch.ones(3, 4), 2)
