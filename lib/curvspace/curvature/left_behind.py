"""Losses that read what a call of the model leaves beside its outputs: an auxiliary loss of it, what a hook has kept.

Such a loss is no function of outputs and targets: it is that of the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from curvspace.batches import batch_flags, number_of_examples
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.independence import SAMPLE, elsewhere, nearly_equal
from curvspace.curvature.linearisation import Batch, Point
from curvspace.differentiation import without_graph
from curvspace.inputs import Inputs
from curvspace.losses import Loss
from curvspace.seeds import replayed_randomness


def reads_calls(point: Point, parts: Sequence[Batch]) -> bool:
    """Whether the loss is another after another call, tried on a few examples of the first and the last part.

    Also at parameters moved at random: at the present ones all examples may leave the same.
    """
    few, others = parts[0].examples(slice(0, SAMPLE)), parts[-1].examples(slice(0, SAMPLE // 2 + 1))
    drawn = partial(replayed_randomness, point.function.device, 0)

    def another(here: Point) -> bool:
        outputs, value = without_graph(lambda: here.evaluate(few, around_loss=drawn()))
        without_graph(partial(here.value, others))
        if not value.isfinite():
            return False
        try:
            with here.function.at(here.parameters, here.constants, few.index), drawn():
                again = without_graph(partial(here.loss_of, outputs, few))
        except Exception:  # the loss's own: there was no such call, or one of another length
            return True
        return not nearly_equal(value, again, 1e3 * torch.finfo(value.dtype).eps)

    return another(point) or bool(unless_it_fails(another, moved(point)))


def reads_calls_of(model: nn.Module, loss: Loss, inputs: Inputs, targets: Any) -> bool:
    """The same of a minibatch and its halves; False where no part of it can be evaluated."""
    n = number_of_examples(inputs, targets)
    if n < 2 or not loss.stateful:
        return False
    flags = (*batch_flags(inputs, n), *batch_flags(targets, n))
    batch = Batch(inputs, targets, 1.0, 0, n, flags)
    halves = batch.examples(slice(0, n // 2)), batch.examples(slice(n // 2, n))
    return bool(unless_it_fails(lambda point: reads_calls(point, halves), Point.here(FrozenModel(model), loss)))


def moved(point: Point) -> Point:
    """At parameters moved at random."""
    return replace(point, parameters=elsewhere(point.parameters, [1] * len(point.parameters)))


def unless_it_fails(ask: Callable[[Point], bool], point: Point) -> bool | None:
    """None where the model or the loss refuses other parameters, as it may."""
    try:
        return ask(point)
    except Exception:
        return None
