"""What a loss is to curvature: any callable, one of torch's, or one with closed-form derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.batches import batch_size
from curvspace.differentiation import pull_back, require_second_derivatives
from curvspace.inputs import copies_of
from curvspace.loss_state import undisturbed
from curvspace.outputs import logits

Reduction = Literal["mean", "sum"]


class Loss:
    """Any callable(outputs, targets) -> mean loss over the examples; its derivatives by autograd on detached outputs.

    The callable gets the model's outputs as they are, also mappings and tuples, and a copy of the targets.
    """

    reduction: Reduction = "mean"
    closed_form = False
    linear = False
    """Whether L is linear in the outputs by definition, so that every Gauss-Newton matrix is zero."""
    stateful = True
    """Whether it may keep something from one call to the next."""

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self._function(outputs, copies_of(targets))

    def outputs(self, raw: Any) -> Any:
        """What of the model's outputs the loss takes."""
        return raw

    def weight(self, targets: Any, size: int | None = None) -> float:
        """The weight W of a batch of ``size`` examples (as the targets have) beside other batches."""
        return float(batch_size(targets) if size is None else size)

    def adds_up(self, targets: Any) -> bool:
        """Whether L is known to be a sum over the examples divided by the sum of their weights."""
        return False

    def at_rest(self, apart_from: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
        """Inside, evaluations leave what it keeps (statistics, centres, counters) as it was, but not in these modules.

        Training moves it once a step.
        """
        return undisturbed(vars(self).get("_function", self), apart_from) if self.stateful else nullcontext()

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        with torch.enable_grad(), self.at_rest():
            z = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(z, targets), z)[0]

    def hessian_product(self, outputs: Tensor, targets: Any, u: Tensor) -> Tensor:
        with torch.enable_grad(), self.at_rest():
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
        self.stateful = isinstance(function, nn.Module) and type(function).__module__ != nn.modules.loss.__name__

    def weight(self, targets: Any, size: int | None = None) -> float:
        if self.reduction == "sum":
            return 1.0
        return float(_tensor(targets, self.name).numel()) if self._over_entries else super().weight(targets, size)


class KnownLoss(Loss):
    """A loss with closed-form derivatives, of a tensor or of outputs where ``outputs.logits`` finds one."""

    name = ""
    closed_form = True
    stateful = False

    def __init__(self, reduction: Reduction = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{self.name}: reduction must be "mean" or "sum", got {reduction!r}: a loss is one number')
        self.reduction = reduction

    def outputs(self, raw: Any) -> Tensor:
        return logits(raw)

    def adds_up(self, targets: Any) -> bool:
        return True

    def weight(self, targets: Any, size: int | None = None) -> float:
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


def _tensor(targets: Any, name: str) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name} needs one tensor of targets, got a {type(targets).__name__}")
    return targets
