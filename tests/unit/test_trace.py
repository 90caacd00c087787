"""Hutch++ against traces that are known, and against the plain estimator at the same cost."""

from __future__ import annotations

import pytest
import torch

from curvspace.curvature import hutchpp


def _decaying(n: int = 300) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return q * torch.arange(1, n + 1).double() ** -2 @ q.T


def test_is_exact_on_low_rank_and_small_operators():
    low = torch.diag(torch.tensor([5.0, 3.0, 1.0] + [0.0] * 97).double())
    assert hutchpp(low, 30).value == pytest.approx(9, abs=1e-9)
    small = torch.diag(torch.arange(6.0))
    assert hutchpp(small, 60).value == pytest.approx(15, abs=1e-4)


def test_beats_the_plain_estimator_where_a_few_eigenvalues_dominate():
    A = _decaying()
    exact = float(A.trace())
    signs = torch.randint(0, 2, (300, 30 * 20), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    plain = (signs * (A @ signs)).sum(0).view(20, 30).mean(1)
    ours = [hutchpp(A, 30, seed=s) for s in range(20)]
    error = sum((t.value - exact) ** 2 for t in ours) ** 0.5
    assert error < 0.2 * float((plain - exact).norm())
    assert all(t.products <= 30 for t in ours)
    assert sum(abs(t.value - exact) < 3 * t.standard_error for t in ours) >= 18


def test_too_few_products_are_refused():
    with pytest.raises(ValueError, match="at least 6 products, got 3"):
        hutchpp(torch.eye(4), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("products", [6, 60])
def test_operators_in_half_precision(dtype, products):
    A = torch.diag(torch.tensor([8.0, 4.0, 2.0] + [0.0] * 5)).to(dtype)
    expected = hutchpp(A.double(), products).value
    assert hutchpp(A, products).value == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.full((9, 9), float("nan")), "not finite"),
        (torch.eye(9, dtype=torch.complex64), "real floating type"),
        (torch.zeros(9, 8), "square"),
    ],
)
def test_what_has_no_trace_is_refused(matrix, said):
    with pytest.raises((RuntimeError, ValueError), match=said):
        hutchpp(matrix, 12)
