r"""Measures between directions and subspaces of parameter space, and what chance alone would give.

Vectors are (P,), bases (P, k). A basis whose columns are not orthonormal is orthonormalised first, so every measure
is a property of the span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from curvspace.inner import inner, norm


def orthonormal_basis(V: Tensor, tol: float | None = None) -> Tensor:
    r"""Orthonormal columns (P, r) with the span of V (P, k), each first brought to unit length.

    Directions with a singular value below ``tol`` of the largest are dropped; the default, :math:`100 k \epsilon`, is
    what rounding the entries can bring about, whatever P is. A matrix that is orthonormal already is returned as it is.
    Entries of 16 bits are computed with, and returned, in float32.
    """
    V = _basis(V)
    if V.shape[1] == 0:  # the empty span, in which nothing lies
        return V
    eps = torch.finfo(V.dtype).eps
    one = torch.eye(V.shape[1], dtype=torch.float64, device=V.device)
    if (inner(V, V, torch.float64) - one).abs().max() < 100 * eps:
        return V
    u, s = _left_singular(_unit(V))
    threshold = (tol if tol is not None else 100 * V.shape[1] * eps) * s[0]
    kept = u[:, s > threshold]
    return kept if V.dtype == torch.float64 else _left_singular(kept)[0]  # once more: rounding was divided by s


def gradient_fraction(g: Tensor, Q: Tensor) -> float:
    r""":math:`|Q^\top g|^2/|g|^2`, the share of g inside span(Q) (paper B, eq. 2). By chance: k/P."""
    q, v = _like_typed(orthonormal_basis(Q), _in_range(_resolved(g)))
    return float((inner(q, v) / norm(v)).square().sum())


def hessian_gradient_overlap(g: Tensor, Hg: Tensor) -> float:
    r""":math:`g^\top H g/(|g||Hg|)`: 1 when the gradient is an eigenvector (paper B, eq. 3)."""
    a, b = _like_typed(_in_range(_resolved(g)), _in_range(_resolved(Hg)))
    return float(inner(a / norm(a), b / norm(b)))


def subspace_overlap(Q1: Tensor, Q2: Tensor) -> float:
    r""":math:`\mathrm{Tr}(P_1P_2)/\sqrt{\mathrm{Tr}P_1\,\mathrm{Tr}P_2}` (paper B, eq. 5).

    By chance :math:`\sqrt{k_1k_2}/P`: see :func:`null_overlap`.
    """
    q1, q2 = _like_typed(orthonormal_basis(Q1), orthonormal_basis(Q2))
    return float(inner(q1, q2).square().sum() / (q1.shape[1] * q2.shape[1]) ** 0.5)


def null_overlap(k1: int, k2: int, P: int) -> float:
    r"""The expected :func:`subspace_overlap` of independent random subspaces: :math:`\sqrt{k_1k_2}/P`."""
    return (k1 * k2) ** 0.5 / P


def principal_angles(Q1: Tensor, Q2: Tensor) -> Tensor:
    r"""Principal angles between two spans, in radians, smallest first, (min(k1, k2),).

    Cosines of small angles lose half of the digits, so those come from the sines (Björck and Golub, 1973).
    """
    q1, q2 = _like_typed(orthonormal_basis(Q1), orthonormal_basis(Q2))
    if q1.shape[1] < q2.shape[1]:
        q1, q2 = q2, q1
    cross = inner(q1, q2)
    cosines = torch.linalg.svdvals(cross).clamp(0, 1)
    sines = _left_singular(q2 - q1 @ cross)[1].clamp(0, 1).flip(0)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines))


class UnionRank(NamedTuple):
    """Numerical rank of [V, E] with the singular values (largest first) that it was read from."""

    rank: int
    singular_values: Tensor


def union_rank(V: Tensor, E: Tensor, tol: float = 1e-3) -> UnionRank:
    """The numerical rank of the columns of V and E together, each at unit length (paper A, eq. 18).

    Singular values above ``tol`` times the largest count. The whole profile is returned: the rank of noisy vectors
    is a statement about the tolerance.
    """
    s = _left_singular(torch.cat(_like_typed(_unit(_basis(V)), _unit(_basis(E))), dim=1))[1]
    return UnionRank(int((s > tol * s[0]).sum()), s)


@dataclass(frozen=True)
class CosineAssignment:
    """|cos| of each vector with each eigenvector, the best one-to-one assignment, its mean, and the chance level."""

    cosines: Tensor
    columns: Tensor
    mean: float
    null: float


def cosine_assignment(V: Tensor, E: Tensor, null_samples: int = 0, seed: int = 0) -> CosineAssignment:
    """Assign each column of V (P, m) to a different column of E (P, k) so that the sum of |cos| is largest.

    ``columns[i]`` is the column of E for column i of V (-1 if m > k leaves it without one). ``null`` is the mean of
    the same statistic for random vectors in place of V (nan without ``null_samples``).
    """
    cosines = _cosines(V, E)
    mean, columns = _assign(cosines)
    null = float("nan")
    if null_samples:
        generator = torch.Generator().manual_seed(seed)
        draws = (
            torch.randn(V.shape, generator=generator, dtype=torch.float32, device="cpu") for _ in range(null_samples)
        )
        null = sum(_assign(_cosines(d.to(E), E))[0] for d in draws) / null_samples
    return CosineAssignment(cosines, columns, mean, null)


def _cosines(V: Tensor, E: Tensor) -> Tensor:
    return inner(*_like_typed(_unit(_basis(V)), _unit(_basis(E)))).abs()


def _basis(V: Tensor) -> Tensor:
    if V.ndim != 2:
        raise ValueError(f"a basis has shape (P, k), got {tuple(V.shape)}")
    return _resolved(V)


def _resolved(V: Tensor) -> Tensor:
    """In a type that resolves a sum of squares: float32 at least."""
    if V.is_complex():
        raise ValueError(f"directions must be real, got {V.dtype}")
    return V.to(torch.promote_types(V.dtype, torch.float32))


def _like_typed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider type of the two."""
    if len(a) != len(b):
        raise ValueError(f"both must have as many rows: got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _unit(V: Tensor) -> Tensor:
    """The columns at unit length; a zero column stays."""
    V = _in_range(V)
    return V / norm(V).clamp_min(torch.finfo(V.dtype).tiny)


def _in_range(V: Tensor) -> Tensor:
    """Columns times powers of two, where their squares would not be in the range of the type."""
    info = torch.finfo(V.dtype)
    lengths = norm(V)
    if ((lengths > info.tiny**0.5 / info.eps) & (lengths < info.max**0.5 * info.eps)).all() or not V.isfinite().all():
        return V
    largest = V.abs().amax(0).clamp_min(info.tiny)
    return V / torch.exp2(torch.floor(torch.log2(largest)))


def _left_singular(V: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (P, r) and all singular values of V (P, k), largest first.

    Of a float32 matrix from its Gram matrix in float64, which resolves all that float32 entries can hold; LAPACK's own
    sums over P are no better than P units of rounding.
    """
    if V.dtype == torch.float64:
        u, s, _ = torch.linalg.svd(V, full_matrices=False)
        return u, s
    values, vectors = torch.linalg.eigh(inner(V, V, torch.float64))
    s = values.clamp_min(0).sqrt().flip(0)[: min(V.shape)]
    weight = torch.where(s > 0, 1 / s, 0.0)
    return V @ (vectors.flip(1)[:, : len(s)] * weight).to(V.dtype), s.to(V.dtype)


def _assign(cosines: Tensor) -> tuple[float, Tensor]:
    from scipy.optimize import linear_sum_assignment  # heavy, and used here alone

    rows, cols = linear_sum_assignment(cosines.double().cpu().numpy(), maximize=True)
    columns = torch.full((cosines.shape[0],), -1, dtype=torch.long, device="cpu")
    columns[torch.as_tensor(rows, device="cpu")] = torch.as_tensor(cols, device="cpu")
    return float(cosines.double().cpu()[rows, cols].mean()), columns
