"""Eigenpairs along a trajectory: right at each point, and cheaper than from scratch."""

from __future__ import annotations

import pytest
import torch

from curvspace import eigsh, track
from curvspace.curvature import SubspaceTracker


def _trajectory(steps: int, rate: float, n: int = 400, outliers: int = 6):
    """A few outliers over a bulk with both signs, turned a little further at each step."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(n - outliers, generator=generator, dtype=torch.float64)
    spectrum = torch.cat([torch.linspace(30, 10, outliers, dtype=torch.float64), bulk])
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    for _ in range(steps):
        yield q * spectrum @ q.T
        turn = torch.randn(n, n, generator=generator, dtype=torch.float64) * rate / n**0.5
        q, _ = torch.linalg.qr(q + (turn - turn.T) @ q)


@pytest.mark.parametrize(("which", "k"), [("LA", 6), ("SA", 2)])
def test_follows_the_spectrum(which, k):
    for A, pairs in zip(_trajectory(4, 1e-2), track(_trajectory(4, 1e-2), k, which, tol=1e-6), strict=True):
        values = torch.linalg.eigvalsh(A)
        expected = values.flip(0)[:k] if which == "LA" else values[:k]
        torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("which", "k", "rate"), [("LA", 6, 1e-4), ("SA", 2, 1e-4)])
def test_saves_two_products_in_five_between_close_checkpoints(which, k, rate):
    cold = [eigsh(A, k, which).products for A in _trajectory(5, rate)]
    warm = [pairs.products for pairs in track(_trajectory(5, rate), k, which)]
    assert warm[0] == cold[0]
    assert sum(warm[1:]) <= 0.65 * sum(cold[1:])


def test_keeps_its_last_pairs_and_counts():
    tracker = SubspaceTracker(2)
    assert tracker.pairs is None
    pairs = [tracker.update(A) for A in _trajectory(2, 1e-2)]
    assert tracker.pairs is pairs[-1]
    assert tracker.products == sum(p.products for p in pairs)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        SubspaceTracker(0)
