"""What a tensor consists of, and how often it was changed."""

from __future__ import annotations

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 where torch does not count, in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors of which a tensor consists: itself, or the indices and values of a sparse or jagged one."""
    if tensor.layout is torch.jagged:
        return [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor, dense or sparse."""
    return sum(part.nbytes for part in dense_parts(tensor))


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode, whose tensors autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor
