"""One minibatch as an optimiser sees it: the passes that it can ask for, each entered in the costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.batches import number_of_examples, select
from curvspace.curvature.class_batches import require_part_exact, splits_exactly
from curvspace.curvature.class_gradients import ClassPass, class_gradients, split_pass, vjp_pass
from curvspace.curvature.frozen import BatchNorm, FrozenModel
from curvspace.curvature.operators import CurvatureOperator
from curvspace.curvature.projected import projected_gauss_newton
from curvspace.differentiation import without_graph
from curvspace.functional import flatten, trainable_parameters
from curvspace.inner import inner
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss
from curvspace.module_state import preserved_buffers
from curvspace.objective import Objective
from curvspace.optim.base import Costs
from curvspace.optim.draws import random_state
from curvspace.optim.ranks import Ranks
from curvspace.outputs import logits
from curvspace.seeds import replayed_randomness

Curvature = Literal["gauss-newton", "hessian"]
CURVATURES = ("gauss-newton", "hessian")
Algorithm = Literal["auto", "split", "vjp"]


@dataclass
class Minibatch:
    """Model, loss and one batch of inputs and targets; ``weight`` is the share of the whole minibatch it is.

    In a process of several (``ranks``) the batch is its shard, and all that is returned is the mean over all shards.
    Only :meth:`gradient` and :meth:`classes` are training passes, which move running statistics; each step makes
    exactly one of them.
    """

    model: nn.Module
    loss: Loss
    inputs: Inputs
    targets: Any
    costs: Costs
    weight: float = 1.0
    ranks: Ranks = field(default_factory=Ranks)
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.share = self.ranks.share(self.loss, self.inputs, self.targets, self.device)
        self._generators = random_state(self.device)

    @property
    def device(self) -> torch.device:
        return next(iter(trainable_parameters(self.model).values())).device

    def part(self, fraction: float) -> Minibatch:
        """The first examples of the batch (drawn at random by the data loader), at least one; all where none counts."""
        n = number_of_examples(self.inputs, self.targets)
        m = max(1, round(fraction * n))
        if m < n and self.loss.weight(select(self.targets, slice(0, m), size=n)) == 0:
            m = n
        if m >= n and self.ranks.alone:
            return self
        if m < n:
            require_part_exact(self.model, self.inputs, self.targets, fraction)
        inputs, targets = select((self.inputs, self.targets), slice(0, m), size=n)
        return Minibatch(
            self.model, self.loss, inputs, targets, self.costs, self.weight * m / n, self.ranks, self.evaluating
        )

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Mean loss and its gradient (P,)."""
        parameters = list(trainable_parameters(self.model).values())
        with torch.enable_grad(), self.evaluating():
            loss = self.loss(call(self.model, self.inputs), self.targets)
            gradient = flatten(torch.autograd.grad(loss, parameters, materialize_grads=True))
        self._count(forward=1, backward=1)
        mean_loss, mean_gradient = self.mean(loss.detach(), gradient)
        return mean_loss, mean_gradient

    def classes(self, num_classes: int, batch_norm: BatchNorm = None, algorithm: Algorithm = "auto") -> ClassPass:
        """Loss, gradient and class gradients; see :class:`~curvspace.optim.bases.ClassGradients` for the options."""
        if not FrozenModel(self.model, batch_norm).keeps_modes:
            return self._classes_apart(num_classes, batch_norm, algorithm)
        interact = not splits_exactly(self.model, self.inputs, self.targets)
        if interact and algorithm == "split":
            raise ValueError(
                'algorithm="split" is not exact with batch statistics, or another mixing of examples; '
                'use "vjp" (or batch_norm="running")'
            )
        if interact or algorithm == "vjp":
            with self.evaluating():
                found = vjp_pass(self.model, self.inputs, self.targets, num_classes, self.loss)
            self._count(forward=1, backward=1 + int(found.counts.count_nonzero()))
            return self._shared(found)
        with self.evaluating():
            found = split_pass(self.model, self.inputs, self.targets, num_classes, self.loss)
        self._count(forward=1, backward=2)
        return self._shared(found)

    def _classes_apart(self, num_classes: int, batch_norm: BatchNorm, algorithm: Algorithm) -> ClassPass:
        """The gradient through the module's present mode, the class gradients through other statistics."""
        parameters = list(trainable_parameters(self.model).values())
        c, counts = class_gradients(
            self.model, self.inputs, self.targets, num_classes, algorithm=algorithm, batch_norm=batch_norm
        )
        shared = algorithm == "vjp" or FrozenModel(self.model, batch_norm).uses_batch_statistics
        with torch.enable_grad(), self.evaluating():
            z = call(self.model, self.inputs)
            loss = self.loss(z, self.targets)
            gradient = flatten(torch.autograd.grad(loss, parameters, materialize_grads=True))
        own = logits(z).detach().softmax(1).gather(1, self.targets.long()[:, None])[:, 0]
        self._count(forward=2, backward=1 + (int(counts.count_nonzero()) if shared else 1))
        return self._shared(ClassPass(loss.detach(), gradient, c, counts, own))

    def _shared(self, found: ClassPass) -> ClassPass:
        """The class pass over all shards: class means by the counts of the class."""
        if self.ranks.alone:
            return found
        loss, gradient = self.mean(found.loss, found.gradient)
        mine = found.counts[:, None].to(gradient.dtype)
        sums, counts = self.ranks.total([mine * found.class_gradients, found.counts])
        c = sums / counts.clamp_min(1)[:, None].to(gradient.dtype)
        return ClassPass(loss, gradient, c, counts, found.probabilities)

    def operator(self, curvature: Curvature) -> CurvatureOperator:
        """The Hessian or Gauss-Newton matrix of this batch; its products are counted by :meth:`count_products`."""
        objective = Objective(self.model, [(self.inputs, self.targets)], self.loss, group=self.ranks.group)
        self._count(forward=1, backward=1)
        return objective.hessian() if curvature == "hessian" else objective.gauss_newton()

    def count_products(self, products: int) -> None:
        """A product with a kept linearisation is about one forward-mode and one reverse pass."""
        self._count(jvp=products, backward=products, products=products)

    def reduced_curvature(self, directions: Tensor, curvature: Curvature) -> Tensor:
        """:math:`R A R^\\top` (m, m) in float64 for directions (P, m), by m forward-mode or Hessian products."""
        m = directions.shape[1]
        if curvature == "gauss-newton":
            reduced = projected_gauss_newton(self.model, self.inputs, self.targets, self.loss, directions)
            self._count(forward=1, backward=1, jvp=m, products=m)
            return self.mean(reduced)[0]
        products = self.operator("hessian") @ directions
        self.count_products(m)
        reduced = inner(directions, products).double()
        return (reduced + reduced.T) / 2

    @torch.no_grad()
    def loss_now(self) -> Tensor:
        """The mean loss at the present parameters in the model's mode, leaving statistics and generators alone.

        Two calls draw the same random numbers (dropout masks).
        """
        torch.clear_autocast_cache()  # it may hold casts of what the parameters were

        def evaluated() -> Tensor:
            with (
                preserved_buffers(self.model),
                replayed_randomness(self.device),
                self.loss.at_rest(set(self.model.modules())),
                self.evaluating(),
            ):
                return self.loss(call(self.model, self.inputs), self.targets)

        loss = without_graph(evaluated)
        self._count(forward=1)
        return self.mean(loss)[0]

    def drew(self) -> bool:
        """Whether random numbers have been drawn since this minibatch was made: a loss seen then has other masks."""
        moved = any(not torch.equal(a, b) for a, b in zip(self._generators, random_state(self.device), strict=True))
        return self.ranks.any([moved], self.device)[0]

    def mean(self, *values: Tensor) -> list[Tensor]:
        """The means over all shards of what was taken over this one."""
        return self.ranks.mean(values, self.share)

    def _count(self, forward: float = 0, backward: float = 0, jvp: float = 0, products: float = 0) -> None:
        self.costs.forward += forward * self.weight
        self.costs.backward += backward * self.weight
        self.costs.jvp += jvp * self.weight
        self.costs.products += products * self.weight
