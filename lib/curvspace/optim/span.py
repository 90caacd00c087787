r"""The span of a few directions of parameter space, without a matrix beside the directions themselves.

The directions are rows of blocks :math:`R` (m, P) kept where they live (running averages, eigenvectors, past
updates). The basis is :math:`Q = R^\top M` (P, k) with a small mixing matrix :math:`M` (m, k), so that neither
normalising nor orthonormalising copies anything of size P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    r"""A basis :math:`Q = R^\top M` of k columns; ``orthonormal`` says whether :math:`Q^\top Q = I` (or 0 for
    directions that are missing, whose columns are zero)."""

    blocks: tuple[Tensor, ...]
    mix: Tensor
    orthonormal: bool

    @property
    def size(self) -> int:
        """Number of columns k of Q."""
        return self.mix.shape[1]

    def coordinates(self, vector: Tensor) -> Tensor:
        r""":math:`Q^\top v`: (P,) -> (k,)."""
        return self.mix.T @ torch.cat([block @ vector for block in self.blocks])

    def combine(self, coefficients: Tensor) -> Tensor:
        r""":math:`Q s`: (k,) -> (P,)."""
        weights = (self.mix @ coefficients).split([len(block) for block in self.blocks])
        total = weights[0] @ self.blocks[0]
        for w, block in zip(weights[1:], self.blocks[1:], strict=True):
            total = total.addmv_(block.T, w)
        return total

    def reject(self, vector: Tensor) -> Tensor:
        r""":math:`v - Q Q^\top v` (P,): paper A, eq. 14, times v. A projection where Q is orthonormal."""
        return vector - self.combine(self.coordinates(vector))

    def directions(self) -> Tensor:
        r"""The unmixed directions :math:`R^\top` (P, m); a view where there is one block."""
        return (self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks)).T

    def matrix(self) -> Tensor:
        """Q itself, dense (P, k)."""
        return self.directions() @ self.mix

    def quadratic(self, reduced: Tensor) -> Tensor:
        r""":math:`Q^\top A Q = M^\top (R A R^\top) M` (k, k) from the matrix A reduced to the directions (m, m)."""
        return self.mix.T @ reduced.to(self.mix) @ self.mix


def unit_span(rows: Tensor) -> Span:
    r"""Unit vectors :math:`v_i = r_i/|r_i|` along the rows (m, P), as they are; zero rows stay zero."""
    return Span((rows,), torch.diag(_inverse_or_zero(torch.linalg.vector_norm(rows, dim=1))), orthonormal=False)


def orthonormal_span(blocks: Sequence[Tensor]) -> Span:
    r"""An orthonormal basis of the span of all rows, from the Gram matrix of the unit rows.

    With :math:`K = V V^\top = U \Lambda U^\top` of the unit rows V, :math:`Q = V^\top U \Lambda^{-1/2}`. Directions
    whose share :math:`\Lambda_i/\Lambda_{\max}` is below 100 times the rounding unit carry noise only: their columns
    are zero, so that shapes never depend on values (no device synchronisation).
    """
    rows = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])
    scale = _inverse_or_zero(rows).double()
    gram = torch.cat([torch.cat([a @ b.T for b in blocks], dim=1) for a in blocks]).double()
    # A diverged run brings NaN, on which eigh raises; the rows carry the NaN on into the step, where it is noticed.
    values, vectors = torch.linalg.eigh((scale[:, None] * gram * scale).nan_to_num())
    cutoff = 100 * torch.finfo(blocks[0].dtype).eps * values[-1]
    weight = torch.where(values > cutoff, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    mix = (scale[:, None] * vectors * weight).to(blocks[0].dtype)
    return Span(tuple(blocks), mix, orthonormal=True)


def identity_span(rows: Tensor) -> Span:
    """Rows (k, P) that are orthonormal already."""
    return Span((rows,), torch.eye(len(rows), dtype=rows.dtype, device=rows.device), orthonormal=True)


def _inverse_or_zero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
