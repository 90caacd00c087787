"""Stochastic Lanczos quadrature against spectra that are known."""

from __future__ import annotations

import pytest
import torch

from curvspace import spectral_density


def test_semicircle_law():
    n = 600
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = (A + A.T) / (2 * n) ** 0.5
    found = spectral_density(A, steps=40, probes=20, width=0.05)
    inside = found.grid.abs() < 1.8
    law = (4 - found.grid[inside] ** 2).sqrt() / (2 * torch.pi)
    assert (found.density[inside] - law).abs().max() < 0.03
    assert found.products == 800
    assert (found.lower <= found.upper).all()


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_integrates_to_one_and_has_the_moments_of_the_spectrum(axis):
    spectrum = torch.cat([torch.tensor([100.0, 30.0]), torch.linspace(-1, 1, 300)]).double()
    found = spectral_density(torch.diag(spectrum), axis=axis, probes=200, steps=8)
    x = found.grid if axis == "linear" else torch.asinh(found.grid / found.linear_width)
    assert float(torch.trapezoid(found.density, x)) == pytest.approx(1, abs=1e-3)
    assert found.moment(1) == pytest.approx(float(spectrum.mean()), rel=0.2)
    assert found.moment(2) == pytest.approx(float(spectrum.square().mean()), rel=0.25)


def test_is_exact_for_few_distinct_eigenvalues():
    spectrum = torch.tensor([2.0] * 30 + [5.0] * 10).double()
    found = spectral_density(torch.diag(spectrum), probes=3, steps=20)
    assert found.products <= 3 * 3  # the Krylov space closes
    held = found.weights > 1e-9
    assert set(found.nodes[held].round(decimals=6).tolist()) == {2.0, 5.0}
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3).double())


@pytest.mark.parametrize("width", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("axis", ["linear", "log"])
def test_integrates_to_one_however_narrow_the_gaussians(axis, width):
    found = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 7.0, -3.0])).double(), width=width, axis=axis)
    x = found.grid if axis == "linear" else torch.asinh(found.grid / found.linear_width)
    assert float(torch.trapezoid(found.density, x)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.eye(3, dtype=torch.complex64), "real floating type"),
        (torch.eye(3, dtype=torch.long), "real floating type"),
        (torch.zeros(3, 4), "square"),
    ],
)
def test_what_has_no_density_is_refused(matrix, said):
    with pytest.raises(ValueError, match=said):
        spectral_density(matrix)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"probes": 0},
        {"points": 2},
        {"points": 20},
        {"width": 0.0},
        {"width": float("inf")},
        {"linear_width": -1.0},
        {"axis": "cubic"},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        spectral_density(torch.eye(4), **arguments)
