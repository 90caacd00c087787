r"""Derivatives by autograd: without a graph, backwards with given cotangents, and a second time or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvspace.inputs import map_tensors


def without_graph(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, evaluated without a graph; with one, cut off after, if it takes derivatives itself.

    Those are models whose outputs are derivatives (forces, differential equations), by ``torch.autograd.grad``.
    """
    try:
        with torch.no_grad():
            return compute()
    except (RuntimeError, ValueError) as error:
        if "require grad" not in str(error):
            raise
    with torch.enable_grad():
        return map_tensors(Tensor.detach, compute())


NO_SECOND_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?_?(\w+?)_backward'? is not implemented")
"""torch's words where a product needs one that it has not, with the name of the operation."""


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    r""":math:`J^\top u = \nabla_x \sum_i \langle y_i(x), u_i \rangle` for outputs y that have a graph to the inputs x.

    ``batched``: m cotangents at once, stacked in front of each u. The options are those of ``torch.autograd.grad``.
    That takes cotangents as ``grad_outputs`` too, but imports sympy to compare shapes at its first use: half a second
    of every process that multiplies with a Hessian. The result is the same, bit for bit, and may share memory with u
    where J is the identity.
    """
    # a view of such pairs as complex numbers must begin at an even place
    cotangents = [u.clone() if u.ndim and u.shape[-1] == 2 and u.storage_offset() % 2 else u for u in cotangents]
    try:
        if batched:
            return torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options)
        with torch.enable_grad():
            inner = _InnerProduct.apply(len(outputs), *outputs, *cotangents)
        return torch.autograd.grad(inner, inputs, **options)
    except RuntimeError as error:
        missing = NO_SECOND_DERIVATIVE.search(str(error))
        if missing is None:
            raise
        raise RuntimeError(
            f"torch has no second derivative of {missing[1]}, which the model or the loss uses (the derivative of "
            f"{missing[1]}_backward is not implemented): put other operations in its place, or take "
            "objective.hessian_by_differences()"
        ) from error


class _InnerProduct(torch.autograd.Function):
    """A scalar whose derivative in each output is its cotangent, as it stands: nothing is multiplied or copied."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cotangents = ctx.saved_tensors
        return (None, *cotangents, *[None] * len(cotangents))


def require_second_derivatives(
    gradient: Sequence[Tensor | None], instead: str = "; take objective.hessian_by_differences()"
) -> None:
    """torch's own error for ``once_differentiable`` hangs beside the way to the parameters: it would take for constant
    what it cannot differentiate, without a word. ``instead`` ends the message."""
    waiting = [g.grad_fn for g in gradient if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                f"the model or the loss has a function without second derivative (once_differentiable){instead}"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
