r"""The whole spectrum of a large operator as a density, by stochastic Lanczos quadrature.

For a random unit vector v, k steps of Lanczos give a Gauss quadrature of the measure
:math:`\sum_i (u_i^\top v)^2\,\delta(\lambda - \lambda_i)`, whose expectation over v is the spectral density
:math:`\phi(\lambda) = \frac1P\sum_i \delta(\lambda-\lambda_i)`. Each node is drawn as a Gaussian of width ``width``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from curvspace.arithmetic import in_own_arithmetic
from curvspace.curvature.krylov import KrylovBasis, SymmetricOperator, plain_operator

MARGIN = 5
"""Standard deviations that the grid reaches beyond the outermost nodes."""


@dataclass(frozen=True)
class SpectralDensity:
    r"""A density over eigenvalues with the spread over probe vectors.

    Attributes
    ----------
    grid : (m,) eigenvalues
    density : (m,) mean over probes. On a linear axis it integrates to 1 over the grid; on the log axis it is per
        unit of :math:`\mathrm{asinh}(\lambda/s)`, s = ``linear_width``
    lower, upper : (m,) the 10 % and 90 % quantiles over probes
    nodes, weights : (probes, steps) the quadrature itself (rows padded with weight 0), any width can be drawn from it
    products : matrix-vector products spent
    """

    grid: Tensor
    density: Tensor
    lower: Tensor
    upper: Tensor
    nodes: Tensor
    weights: Tensor
    products: int
    linear_width: float | None = None

    def moment(self, order: int = 1) -> float:
        r""":math:`\frac1P\mathrm{Tr}A^n` from the quadrature (exact in each probe for n < 2 steps)."""
        return float((self.weights * self.nodes**order).sum(1).mean())


@in_own_arithmetic
def spectral_density(
    A: SymmetricOperator,
    *,
    steps: int = 40,
    probes: int = 5,
    points: int | None = None,
    width: float | None = None,
    axis: Literal["linear", "log"] = "linear",
    linear_width: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """The spectral density of A from ``probes`` runs of ``steps`` Lanczos steps with full reorthogonalisation.

    Parameters
    ----------
    points
        Of the grid (default 512, or as many more as the width asks for).
    width
        Standard deviation of the Gaussian at each node, as a share of the axis (default 1 / ``steps``, about the
        distance between nodes).
    axis
        ``"log"`` spaces the grid by asinh(lambda / linear_width): logarithmic on both sides of a linear
        neighbourhood of zero, for spectra with outliers. ``linear_width`` defaults to 1e-3 of the largest magnitude.

    Raises
    ------
    ValueError
        For steps or probes below 1, a width that is not positive, or a grid that is too coarse for it.
    """
    A = plain_operator(A, "spectral_density")
    for name, count in (("steps", steps), ("probes", probes), ("points", points)):
        if count is not None and not (isinstance(count, Integral) and count > 0):
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    width = 1 / steps if width is None else width
    for name, value in (("width", width), ("linear_width", linear_width)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    finest = math.ceil(1 / width + 2 * MARGIN) + 1
    points = max(512, finest) if points is None else points
    if points < finest:
        raise ValueError(
            f"{points} points would miss Gaussians of width {width:g}: give at least {finest}, or a larger width"
        )
    if axis not in ("linear", "log"):
        raise ValueError(f'axis must be "linear" or "log", got {axis!r}')
    steps = min(steps, A.shape[0])
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(probes, steps, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(nodes)
    products = 0
    for probe in range(probes):
        theta, weight, spent = _quadrature(A, steps, generator)
        nodes[probe, : len(theta)], weights[probe, : len(theta)] = theta, weight
        products += spent
    scale = None
    if axis == "log":
        scale = linear_width or 1e-3 * float(nodes.abs().max()) or 1.0
    grid, curves = _smoothed(nodes, weights, points, width, scale)
    quantiles = torch.quantile(curves, torch.tensor([0.1, 0.9], dtype=torch.float64, device="cpu"), dim=0)
    return SpectralDensity(grid, curves.mean(0), quantiles[0], quantiles[1], nodes, weights, products, scale)


def _quadrature(A: SymmetricOperator, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights from one random start vector; a Krylov space that closes early is exact."""
    basis = KrylovBasis(A, steps, generator)
    basis.offer()
    while basis.size < steps and len(basis.C):
        basis.expand()
    theta, s = basis.ritz()
    return theta * (basis.unit or 1.0), s[0].square(), basis.products


def _smoothed(nodes: Tensor, weights: Tensor, points: int, width: float, scale: float | None) -> tuple[Tensor, Tensor]:
    """The grid in eigenvalues and one curve per probe, each of unit integral over the (transformed) axis."""
    x = nodes if scale is None else torch.asinh(nodes / scale)
    held = x[weights > 0]
    span = float(held.max() - held.min()) or max(float(held.abs().max()), 1.0)
    sigma = width * span
    low, high = float(held.min()) - MARGIN * sigma, float(held.max()) + MARGIN * sigma
    grid = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
    bumps = torch.exp(-0.5 * ((grid - x[..., None]) / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
    curves = (weights[..., None] * bumps).sum(1)
    return (grid if scale is None else scale * torch.sinh(grid)), curves
