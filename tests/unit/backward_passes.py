"""Functions whose backward pass is written by hand, as users and kernels write them, right or with some defect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        ctx.slope = slope
        return value(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.slope(g, *ctx.saved_tensors), None, None


def by_hand(value: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x ↦ value(x), whose backward pass turns the cotangent g into slope(g, x)."""
    return lambda x: _ByHand.apply(x, value, slope)


class OnceTanh(torch.autograd.Function):
    """tanh(x), declared to have no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)
