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

from curvspace.inner import inner, norm


@dataclass(frozen=True)
class Span:
    r"""A basis :math:`Q = R^\top M` of k columns; ``orthonormal`` says whether :math:`Q^\top Q = I` (or 0 for
    directions that are missing, whose columns are zero).

    ``dual`` (m, k) takes the place of M where coordinates are measured, for splits of a vector into
    :math:`Q M_*^\top R v` and the rest that are no symmetric ones; None: M itself.
    """

    blocks: tuple[Tensor, ...]
    mix: Tensor
    orthonormal: bool
    dual: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of columns k of Q."""
        return self.mix.shape[1]

    def coordinates(self, vector: Tensor) -> Tensor:
        r""":math:`Q^\top v`: (P,) -> (k,); with ``dual`` :math:`M_*^\top R v`."""
        measuring = self.mix if self.dual is None else self.dual
        return measuring.T @ torch.cat([inner(block.T, vector) for block in self.blocks])

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
    return Span((rows,), torch.diag(_inverse_or_zero(norm(rows.T))), orthonormal=False)


def sequential_span(rows: Tensor) -> Span:
    r"""Unit vectors along the rows (m, P), taken out of a vector one after the other.

    .. math:: r_0 = v, \qquad a_k = v_k^\top r_{k-1}, \qquad r_k = r_{k-1} - a_k v_k

    Coordinates are the :math:`a_k`, which solve :math:`(I + L)\,a = V v` with the strictly lower part L of
    :math:`V V^\top`; the rest is :math:`r_m = \prod_k (I - v_k v_k^\top)\,v`, never longer than v.
    """
    unit, gram = _unit_gram([rows])
    lower = torch.eye(len(rows), dtype=gram.dtype, device=gram.device) + gram.tril(-1)
    inverse = torch.linalg.solve_triangular(lower, torch.diag(unit), upper=False, unitriangular=True)
    return Span((rows,), torch.diag(unit).to(rows), orthonormal=False, dual=inverse.T.to(rows))


def ordered_span(rows: Tensor) -> Span:
    r"""The rows (m, P) orthonormalised in their order, as by the QR decomposition with positive diagonal.

    :math:`q_k \propto v_k - \sum_{j<k} (q_j^\top v_k)\,q_j`. A row that adds nothing beyond rounding to those before
    it has a zero column.
    """
    unit, gram = _unit_gram([rows])
    mix = torch.zeros_like(gram)
    cutoff = 100 * torch.finfo(rows.dtype).eps
    for k in range(len(rows)):  # Gram-Schmidt on coefficients: q_k = V^T mix[:, k]
        column = -(mix @ (mix.T @ gram[:, k]))
        column[k] += 1
        square = column @ gram @ column
        mix[:, k] = torch.where(square > cutoff, column * square.clamp_min(cutoff).rsqrt(), 0.0)
    return Span((rows,), (unit[:, None] * mix).to(rows), orthonormal=True)


def symmetric_span(rows: Tensor) -> Span:
    r"""Loewdin's orthonormalisation of the rows (m, P): the orthonormal basis nearest to their unit vectors.

    :math:`Q = V^\top (V V^\top)^{-1/2}` minimises :math:`\sum_k |q_k - v_k|^2`, whatever the order of the rows. Where
    they are dependent it is the pseudo-inverse's root: :math:`QQ^\top` still projects on their span.
    """
    unit, gram = _unit_gram([rows])
    vectors, weight = _principal(gram, rows.dtype)
    mix = unit[:, None] * (vectors * weight) @ vectors.T
    return Span((rows,), mix.to(rows), orthonormal=True)


def orthonormal_span(blocks: Sequence[Tensor]) -> Span:
    r"""An orthonormal basis of the span of all rows, from the Gram matrix of the unit rows.

    With :math:`K = V V^\top = U \Lambda U^\top` of the unit rows V, :math:`Q = V^\top U \Lambda^{-1/2}`. Directions
    whose share :math:`\Lambda_i/\Lambda_{\max}` is below 100 times the rounding unit carry noise only: their columns
    are zero, so that shapes never depend on values (no device synchronisation).
    """
    unit, gram = _unit_gram(blocks)
    vectors, weight = _principal(gram, blocks[0].dtype)
    return Span(tuple(blocks), (unit[:, None] * vectors * weight).to(blocks[0].dtype), orthonormal=True)


def principal_span(rows: Tensor, k: int, centred: bool) -> Span:
    r"""The k principal directions of the rows (m, P), m > k, orthonormal; ``centred``: about their mean.

    With the centring matrix :math:`J = I - 11^\top/m` (or I) and :math:`J R R^\top J = U\Lambda U^\top`, the leading
    columns of :math:`R^\top J U \Lambda^{-1/2}`.
    """
    centre = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    if centred:
        centre -= 1 / len(rows)
    gram = centre @ inner(rows.T, rows.T).double().nan_to_num() @ centre
    vectors, weight = _principal(gram, rows.dtype)
    return Span((rows,), (centre @ vectors * weight)[:, -k:].to(rows), orthonormal=True)


def identity_span(rows: Tensor) -> Span:
    """Rows (k, P) that are orthonormal already."""
    return Span((rows,), torch.eye(len(rows), dtype=rows.dtype, device=rows.device), orthonormal=True)


def _unit_gram(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """In float64: the factors (m,) that make the rows unit vectors, and the Gram matrix (m, m) of these."""
    scale = _inverse_or_zero(torch.cat([norm(block.T) for block in blocks])).double()
    gram = torch.cat([torch.cat([inner(a.T, b.T) for b in blocks], dim=1) for a in blocks]).double()
    # A diverged run brings NaN, on which eigh raises; the rows carry the NaN on into the step, where it is noticed.
    return scale, (scale[:, None] * gram * scale).nan_to_num()


def _principal(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""Eigenvectors U (m, m) of a Gram matrix and :math:`\Lambda^{-1/2}`, zero where only rounding is left."""
    values, vectors = torch.linalg.eigh(gram)
    weight = values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    return vectors, torch.where(values > 100 * torch.finfo(dtype).eps * values[-1], weight, 0.0)


def _inverse_or_zero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
