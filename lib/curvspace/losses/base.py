"""What a loss is to curvature: any callable, one of torch's, or one with closed-form derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.batches import batch_size
from curvspace.differentiation import pull_back, require_second_derivatives
from curvspace.module_state import left_alone
from curvspace.outputs import logits

Reduction = Literal["mean", "sum"]


class Loss:
    """Any callable(outputs, targets) -> mean loss over the examples; its derivatives by autograd on detached outputs.

    The callable gets the model's outputs as they are, also mappings and tuples.
    """

    reduction: Reduction = "mean"
    closed_form = False
    linear = False
    """Whether L is linear in the outputs by definition, so that every Gauss-Newton matrix is zero."""

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self._function(outputs, targets)

    def outputs(self, raw: Any) -> Any:
        """What of the model's outputs the loss takes."""
        return raw

    def weight(self, targets: Any) -> float:
        """The batch's weight W beside other batches."""
        return float(batch_size(targets))

    def adds_up(self, targets: Any) -> bool:
        """Whether L is known to be a sum over the examples divided by the sum of their weights."""
        return False

    def modules(self) -> list[nn.Module]:
        """Modules that it is or calls, whose state an evaluation may move (statistics, centres, counters)."""
        return _modules_of(self._function, 0)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        with torch.enable_grad(), left_alone(self.modules()):
            z = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(z, targets), z)[0]

    def hessian_product(self, outputs: Tensor, targets: Any, u: Tensor) -> Tensor:
        with torch.enable_grad(), left_alone(self.modules()):
            z = outputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(z, targets), z, create_graph=True)
            require_second_derivatives([g])
            if not g.requires_grad:  # linear in z
                return torch.zeros_like(u)
            return pull_back([g], [z], [u.detach()], materialize_grads=True)[0]


class TorchLoss(Loss):
    """A loss of torch's that has no closed form here: a mean over the entries, one over the examples, or a sum."""

    def __init__(self, function: Callable[[Any, Any], Tensor], reduction: str, over_entries: bool):
        super().__init__(function)
        self.name = getattr(getattr(function, "func", None), "__name__", self.name)
        if reduction not in ("mean", "sum", "batchmean"):
            raise ValueError(f'{self.name}: reduction must be "mean" or "sum", got {reduction!r}: a loss is one number')
        self.reduction = "sum" if reduction == "sum" else "mean"
        self._over_entries = over_entries and reduction == "mean"

    def modules(self) -> list[nn.Module]:
        return []  # they have no state

    def weight(self, targets: Any) -> float:
        if self.reduction == "sum":
            return 1.0
        return float(_tensor(targets, self.name).numel()) if self._over_entries else super().weight(targets)


class KnownLoss(Loss):
    """A loss with closed-form derivatives, of a tensor or of outputs where ``outputs.logits`` finds one."""

    name = ""
    closed_form = True

    def __init__(self, reduction: Reduction = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{self.name}: reduction must be "mean" or "sum", got {reduction!r}: a loss is one number')
        self.reduction = reduction

    def modules(self) -> list[nn.Module]:
        return []

    def outputs(self, raw: Any) -> Tensor:
        return logits(raw)

    def adds_up(self, targets: Any) -> bool:
        return True

    def weight(self, targets: Any) -> float:
        return float(self.normaliser(_tensor(targets, self.name))) if self.reduction == "mean" else 1.0

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """W of a mean over these targets."""
        raise NotImplementedError

    def _divisor(self, targets: Tensor) -> Tensor | int:
        """W of a mean, 1 of a sum. Where nothing counts, both derivatives over it are 0, though the mean is 0/0."""
        if self.reduction != "mean":
            return 1
        total = self.normaliser(targets)
        if not isinstance(total, Tensor):
            return total
        return total.masked_fill(total == 0, math.inf if total.is_floating_point() else 1)


def _modules_of(held: Any, depth: int) -> list[nn.Module]:
    """A module, or those of a callable: bound, in its closure, among its attributes, or global and named in it."""
    if isinstance(held, nn.Module) or depth == 3:
        return [held] if isinstance(held, nn.Module) else []
    inside: list[Any] = []
    if isinstance(held, MethodType):
        inside = [held.__self__, held.__func__]
    elif isinstance(held, functools.partial):
        inside = [held.func, *held.args, *held.keywords.values()]
    elif isinstance(held, FunctionType):
        cells = map(_content, held.__closure__ or ())
        inside = [*cells, *(held.__globals__.get(name) for name in held.__code__.co_names)]
    elif depth == 0:
        inside = [*getattr(held, "__dict__", {}).values(), type(held).__call__]
    return [m for value in inside for m in _modules_of(value, depth + 1)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _tensor(targets: Any, name: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name} needs one tensor of targets, got a {type(targets).__name__}")
    return targets
