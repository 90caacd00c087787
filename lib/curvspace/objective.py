r"""A model, a loss and weighted batches as one function of the parameters.

.. math:: L(\theta) = \sum_b \frac{n_b}{N}\, L_b(\theta), \qquad L_b = \text{mean loss over the } n_b \text{ examples of batch } b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.curvature.frozen import FrozenModel, State
from curvspace.curvature.linearisation import Batch, Point
from curvspace.curvature.operators import Engine, GaussNewtonOperator, HessianOperator
from curvspace.functional import Inputs, batch_size, flatten, select
from curvspace.losses import Loss, get_loss


class Objective:
    """Loss, gradient and curvature operators of a model on a fixed set of batches.

    Parameters
    ----------
    model
        Any ``nn.Module``; its trainable parameters are the P coordinates, in ``named_parameters()`` order.
    batches
        Pairs (inputs, targets). Inputs: a tensor (``model(x)``), a tuple (``model(*x)``), a mapping (``model(**x)``).
    loss
        ``"cross_entropy"``, ``"mse"`` (half the squared distance), or a callable(outputs, targets) -> mean loss.
    engine
        ``"linearize"`` keeps each batch's gradient graph, ``"recompute"`` rebuilds it for each product,
        ``"auto"`` keeps as many as ``memory_budget`` bytes allow.
    state, dropout_seed, dtype
        See :class:`~curvspace.curvature.frozen.FrozenModel`.
    microbatch
        Evaluate at most this many examples at a time. Not possible when examples interact (batch statistics).
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
        microbatch: int | None = None,
        memory_budget: int | None = None,
        group: Any = None,
    ):
        self.model = model
        self.function = FrozenModel(model, state, dropout_seed, dtype)
        self.loss_function = get_loss(loss)
        self.engine: Engine = engine
        self.memory_budget = memory_budget
        self.group = group
        pairs = [_checked(i, *pair) for i, pair in enumerate(batches)]
        if not pairs:
            raise ValueError("an objective needs at least one batch, got none")
        self.num_examples = sum(batch_size(x) for x, _ in pairs)
        self.batches = list(self._split(pairs, microbatch))

    def _split(self, pairs: list[tuple[Inputs, Tensor]], microbatch: int | None) -> Iterator[Batch]:
        if microbatch is not None and self.function.examples_interact:
            raise ValueError("microbatch would change the batch statistics or dropout draws; split the batches instead")
        for index, (x, y) in enumerate(pairs):
            n = batch_size(x)
            step = microbatch or n
            for start in range(0, n, step):
                part = slice(start, min(start + step, n))
                yield Batch(select(x, part), y[part], (part.stop - start) / self.num_examples, index)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _point(self) -> Point:
        return Point(self.function, self.loss_function, self.function.parameters(), self.function.constants())

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss L at the model's present parameters."""
        point = self._point()
        total = sum(b.weight * self.loss_function(point.outputs(b), point.targets(b)).double() for b in self.batches)
        return float(total)

    def gradient(self) -> Tensor:
        """The gradient of L at the model's present parameters, (P,)."""
        point = self._point()
        total = torch.zeros(self.num_parameters, dtype=self.function.dtype, device=self.function.device)
        for b in self.batches:
            with torch.enable_grad():
                value = b.weight * self.loss_function(point.outputs(b), point.targets(b))
            total += flatten(torch.autograd.grad(value, point.parameters, materialize_grads=True))
        return total

    def hessian(self) -> HessianOperator:
        """The Hessian of L at the present parameters (a copy: later changes of the model do not matter)."""
        return HessianOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)

    def gauss_newton(self) -> GaussNewtonOperator:
        """The generalised Gauss-Newton matrix of L at the present parameters (a copy, as for the Hessian)."""
        return GaussNewtonOperator(self._point(), self.batches, self.engine, self.memory_budget, self.group)


def _checked(index: int, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
    n = batch_size(inputs)
    if n == 0:
        raise ValueError(f"batch {index} is empty")
    if isinstance(targets, Tensor) and targets.shape[0] != n:
        raise ValueError(f"batch {index} has {n} inputs but {targets.shape[0]} targets")
    return inputs, targets
