r"""Measures between directions and subspaces of parameter space, and what chance alone would give.

Vectors are (P,), bases (P, k). A basis whose columns are not orthonormal is orthonormalised first, so every measure
is a property of the span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def orthonormal_basis(V: Tensor, tol: float | None = None) -> Tensor:
    """Orthonormal columns (P, r) with the span of V (P, k); directions below ``tol`` of the largest are dropped.

    A matrix that is orthonormal already is returned as it is.
    """
    if V.ndim != 2:
        raise ValueError(f"a basis has shape (P, k), got {tuple(V.shape)}")
    if V.shape[1] == 0:  # the empty span, in which nothing lies
        return V
    eps = torch.finfo(V.dtype).eps
    gram = V.T @ V
    if (gram - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).abs().max() < 100 * eps:
        return V
    norms = V.norm(dim=0)
    scaled = V / torch.where(norms > 0, norms, torch.ones_like(norms))
    u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    threshold = (tol if tol is not None else max(V.shape) * eps) * s[0]
    return u[:, s > threshold]


def gradient_fraction(g: Tensor, Q: Tensor) -> float:
    r""":math:`|Q^\top g|^2/|g|^2`, the share of g inside span(Q) (paper B, eq. 2). By chance: k/P."""
    q = orthonormal_basis(Q).to(g.dtype)
    return float((q.T @ g).square().sum() / g.square().sum())


def hessian_gradient_overlap(g: Tensor, Hg: Tensor) -> float:
    r""":math:`g^\top H g/(|g||Hg|)`: 1 when the gradient is an eigenvector (paper B, eq. 3)."""
    return float((g @ Hg) / (g.norm() * Hg.norm()))


def subspace_overlap(Q1: Tensor, Q2: Tensor) -> float:
    r""":math:`\mathrm{Tr}(P_1P_2)/\sqrt{\mathrm{Tr}P_1\,\mathrm{Tr}P_2}` (paper B, eq. 5).

    By chance :math:`\sqrt{k_1k_2}/P`: see :func:`null_overlap`.
    """
    q1, q2 = orthonormal_basis(Q1), orthonormal_basis(Q2)
    return float((q1.T @ q2).square().sum() / (q1.shape[1] * q2.shape[1]) ** 0.5)


def null_overlap(k1: int, k2: int, P: int) -> float:
    r"""The expected :func:`subspace_overlap` of independent random subspaces: :math:`\sqrt{k_1k_2}/P`."""
    return (k1 * k2) ** 0.5 / P


def principal_angles(Q1: Tensor, Q2: Tensor) -> Tensor:
    r"""Principal angles between two spans, in radians, smallest first, (min(k1, k2),).

    Cosines of small angles lose half of the digits, so those come from the sines (Björck and Golub, 1973).
    """
    q1, q2 = orthonormal_basis(Q1), orthonormal_basis(Q2)
    if q1.shape[1] < q2.shape[1]:
        q1, q2 = q2, q1
    cross = q1.T @ q2
    cosines = torch.linalg.svdvals(cross).clamp(0, 1)
    sines = torch.linalg.svdvals(q2 - q1 @ cross).clamp(0, 1).flip(0)
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
    columns = [M / M.norm(dim=0).clamp_min(torch.finfo(M.dtype).tiny) for M in (V, E)]
    s = torch.linalg.svdvals(torch.cat(columns, dim=1))
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
        draws = (torch.randn(V.shape, generator=generator, dtype=torch.float32) for _ in range(null_samples))
        null = sum(_assign(_cosines(d.to(E), E))[0] for d in draws) / null_samples
    return CosineAssignment(cosines, columns, mean, null)


def _cosines(V: Tensor, E: Tensor) -> Tensor:
    tiny = torch.finfo(V.dtype).tiny
    return ((V / V.norm(dim=0).clamp_min(tiny)).T @ (E / E.norm(dim=0).clamp_min(tiny))).abs()


def _assign(cosines: Tensor) -> tuple[float, Tensor]:
    from scipy.optimize import linear_sum_assignment  # heavy, and used here alone

    rows, cols = linear_sum_assignment(cosines.double().cpu().numpy(), maximize=True)
    columns = torch.full((cosines.shape[0],), -1, dtype=torch.long)
    columns[torch.as_tensor(rows)] = torch.as_tensor(cols)
    return float(cosines.double().cpu()[rows, cols].mean()), columns
