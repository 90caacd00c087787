r"""A model, a loss and weighted batches as one function of the parameters.

.. math:: L(\theta) = \sum_b \frac{n_b}{N}\, L_b(\theta), \qquad N = \sum_b n_b,

with L_b the mean loss over the n_b examples of batch b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.curvature.frozen import FrozenModel, State
from curvspace.curvature.linearisation import Batch, Point
from curvspace.curvature.operators import Engine, GaussNewtonOperator, HessianOperator
from curvspace.curvature.split import cache_friendly_size, split, within_memory
from curvspace.functional import Inputs, batch_size, flatten
from curvspace.losses import Loss, get_loss

SPLIT_ABOVE = 256
"""Batches up to this size are never cut for the processor's caches: finding the best size would not pay."""


class Objective:
    """Loss, gradient and curvature operators of a model on a fixed set of batches.

    Parameters
    ----------
    model
        Any ``nn.Module``; its trainable parameters are the P coordinates, in ``named_parameters()`` order.
    batches
        Pairs (inputs, targets). Inputs: a tensor (``model(x)``), a tuple (``model(*x)``), a mapping (``model(**x)``).
    loss
        ``"cross_entropy"``, ``"mse"`` (half the squared distance), or a callable(outputs, targets) -> mean over
        the examples.
    engine, memory_budget
        ``"linearize"`` keeps each batch's gradient graph, ``"recompute"`` rebuilds it for each product,
        ``"auto"`` keeps as many as ``memory_budget`` bytes allow (default: a share of the free memory).
    state
        How batch normalisation behaves: ``"batch"`` or ``"running"`` statistics, ``None``: the module's present
        mode. Running statistics are never changed.
    dropout_seed
        ``None`` turns dropout off; an integer fixes its masks.
    dtype
        Evaluate in this floating type, for example ``torch.float64``.
    microbatch
        Evaluate at most this many examples at a time; ``None``: batches as they are; ``"auto"``: on a CPU, as many
        as suit its caches. Only where examples do not interact (no batch statistics).
    group
        A ``torch.distributed`` process group whose ranks each hold a shard of the batches; ``"auto"``: the default
        group where one is initialised; ``None``: this process alone.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Inputs, Tensor]],
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        *,
        engine: Engine = "auto",
        state: State = None,
        dropout_seed: int | None = None,
        dtype: torch.dtype | None = None,
        microbatch: int | Literal["auto"] | None = "auto",
        memory_budget: int | None = None,
        group: Any = "auto",
    ):
        self.model = model
        self.function = FrozenModel(model, state, dropout_seed, dtype)
        self.loss_function = get_loss(loss)
        self.engine: Engine = engine
        self.memory_budget = memory_budget
        self.group = _default_group() if group == "auto" else group
        self._microbatch = microbatch
        if isinstance(microbatch, int) and self.function.examples_interact:
            raise ValueError("microbatch would change batch statistics or dropout masks; pass smaller batches instead")
        pairs = [_checked(i, *pair) for i, pair in enumerate(batches)]
        if not pairs:
            raise ValueError("an objective needs at least one batch, got none")
        local = sum(batch_size(x) for x, _ in pairs)
        self.num_examples = int(self._summed(torch.tensor(local, device=self.function.device)))
        self._given = [
            Batch(x, y, batch_size(x) / self.num_examples, i, batch_size(x)) for i, (x, y) in enumerate(pairs)
        ]

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def policy(self) -> dict[str, str]:
        """The state policy, in words for an output table."""
        return self.function.policy

    @cached_property
    def batches(self) -> list[Batch]:
        """What is evaluated at a time, with weights that sum to 1."""
        if isinstance(self._microbatch, int):
            return split(self._given, self._microbatch)
        largest = max(self._given, key=lambda b: b.size)
        alone = self.function.examples_interact or self.function.device.type != "cpu" or largest.size <= SPLIT_ABOVE
        if self._microbatch is None or alone:
            return self._given
        return split(self._given, cache_friendly_size(self._point(), largest))

    def loss(self) -> float:
        """The mean loss L at the model's present parameters."""
        point = self._point()

        def total(batches: list[Batch]) -> Tensor:
            with torch.no_grad():
                parts = [b.weight * point.loss_of(point.outputs(b), b).double() for b in batches]
            return torch.stack(parts).sum()

        return float(self._summed(self._within_memory(total)))

    def gradient(self) -> Tensor:
        """The gradient of L at the model's present parameters, (P,)."""
        point = self._point()

        def total(batches: list[Batch]) -> Tensor:
            result = torch.zeros(self.num_parameters, dtype=self.function.dtype, device=self.function.device)
            for b in batches:
                with torch.enable_grad():
                    value = b.weight * point.finite_loss_of(point.outputs(b), b)
                result += flatten(torch.autograd.grad(value, point.parameters, materialize_grads=True))
            return result

        return self._summed(self._within_memory(total))

    def hessian(self) -> HessianOperator:
        """The Hessian of L at the present parameters (copies: later changes of the model do not matter)."""
        self._require_deterministic()
        return HessianOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)

    def gauss_newton(self) -> GaussNewtonOperator:
        """The generalised Gauss-Newton matrix of L at the present parameters (copies, as for the Hessian)."""
        self._require_deterministic()
        return GaussNewtonOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)

    def _point(self) -> Point:
        return Point.here(self.function, self.loss_function)

    def _within_memory(self, compute: Callable[[list[Batch]], Tensor]) -> Tensor:
        divisible = not self.function.examples_interact
        result, self.batches = within_memory(compute, self.batches, divisible=divisible)
        return result

    def _summed(self, value: Tensor) -> Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(value, group=self.group)
        return value

    @torch.no_grad()
    def _require_deterministic(self) -> None:
        """Evaluate a few examples twice: a product with a kept graph would hide that the model draws at random."""
        few = split(self._given[:1], 4)[0]
        point = self._point()
        first, second = point.outputs(few), point.outputs(few)
        tolerance = 1e3 * torch.finfo(first.dtype).eps * first.abs().max()
        if (first - second).abs().max() > tolerance:
            raise RuntimeError(
                f"{type(self.model).__name__} is not deterministic: two evaluations of the same "
                f"{few.size} examples of batch 0 differ by {float((first - second).abs().max()):.1e}"
            )


def _default_group() -> Any:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return distributed.group.WORLD
    return None


def _checked(index: int, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
    n = batch_size(inputs)
    if n == 0:
        raise ValueError(f"batch {index} is empty")
    if targets.shape[0] != n:
        raise ValueError(f"batch {index} has {n} inputs but {targets.shape[0]} targets")
    return inputs, targets
