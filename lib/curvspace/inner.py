r"""Inner products of vectors of millions of entries, right to the rounding of their entries.

A float32 product over P entries adds them in float32: of P = 1.2e7 a CPU's BLAS gets :math:`|v|^2` wrong by 1e-3 and
the Gram matrix of a (P, k) matrix by 2e-2. Here at most ``PIECE`` entries are added so, and of longer vectors all in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**16


def inner(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    r""":math:`A^\top B` over the first dimension: (P, m) and (P, k) give (m, k), (P,) in either place has no column.

    ``dtype`` of the result; one that is asked for is also that of every product. The default is that of the inputs.
    """
    if dtype is None and len(a) <= PIECE:
        return _transposed(a) @ b
    pieces = zip(a.split(PIECE), b.split(PIECE), strict=True)
    total = sum(_transposed(x.double()) @ y.double() for x, y in pieces)
    return torch.as_tensor(total, device=a.device).to(dtype or torch.promote_types(a.dtype, b.dtype))


def norm(x: Tensor) -> Tensor:
    r""":math:`|x|` of (P,), or of each column of (P, k)."""
    if len(x) <= PIECE:
        return torch.linalg.vector_norm(x, dim=0)
    short = PIECE // 16
    whole = len(x) // short
    parts = torch.linalg.vector_norm(x[: whole * short].unflatten(0, (whole, short)), dim=1).double()
    rest = torch.linalg.vector_norm(x[whole * short :], dim=0).double()
    return torch.linalg.vector_norm(torch.cat([parts, rest[None]]), dim=0).to(x.dtype)


def _transposed(a: Tensor) -> Tensor:
    return a if a.ndim == 1 else a.mT
