"""Whether a model and its loss give the same numbers twice, without which no curvature of theirs means anything."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from curvspace.curvature.independence import SAMPLE, seem_independent
from curvspace.curvature.linearisation import Batch, Point
from curvspace.differentiation import without_graph
from curvspace.outputs import output_tensors
from curvspace.seeds import generator_states, replayed_randomness

SEEDS = 32
"""Draws on which a model that draws is tried: what they do not change may be drawn."""


def require_deterministic_outputs(point: Point, batch: Batch) -> None:
    """Evaluate a few examples several times, or all of the batch where the model does not treat them one by one.

    Raises
    ------
    RuntimeError
        If two evaluations differ.
    """
    if batch.size > SAMPLE and seem_independent(point.function, batch.inputs, batch.size, batch.flags):
        batch = batch.examples(slice(0, SAMPLE // 2))

    def evaluated() -> list[Tensor]:
        outputs = point._outputs(batch)
        return output_tensors(outputs) or [point.loss_of(outputs, batch)]  # of a form that only the loss knows

    name = type(point.function.model).__name__
    _require_no_draws(evaluated, point, batch, name, f"{batch.size} examples of batch 0")


def require_deterministic_loss(point: Point, batch: Batch) -> None:
    """Evaluate the loss of all the batch several times, as it may be no mean of parts, where the outputs are the same.

    Raises
    ------
    RuntimeError
        If two evaluations differ.
    """
    name = f"the loss {point.loss.name}"
    _require_no_draws(lambda: [point.value(batch)], point, batch, name, f"{batch.size} outputs of batch 0")


def _require_no_draws(evaluate: Callable[[], list[Tensor]], point: Point, batch: Batch, what: str, where: str) -> None:
    """Two evaluations with different draws agree; where any are made, many do: a draw may seldom matter."""
    first, drawn = _drawn_anew(0, evaluate, point, batch)
    for seed in range(1, SEEDS if drawn else 2):
        again, _ = _drawn_anew(seed, evaluate, point, batch)
        for a, b in zip(first, again, strict=True):
            _require_same(a, b, what, where)


def _drawn_anew(
    seed: int, evaluate: Callable[[], list[Tensor]], point: Point, batch: Batch
) -> tuple[list[Tensor], bool]:
    """What is evaluated with draws from this seed, and whether any were made that the policy does not replay."""
    function, device = point.function, point.function.device

    def watched() -> tuple[list[Tensor], bool]:
        with function.policy_in_force(), function.at(point.parameters, point.constants, batch.index):
            before = generator_states(device)
            found = evaluate()
            return found, function.dropout_seed is None and generator_states(device) != before

    with replayed_randomness(device, seed):  # an evaluation alone leaves the generators as they were
        return without_graph(watched)


def _require_same(a: Tensor, b: Tensor, what: str, where: str) -> None:
    a, b = (t.detach() if t.is_floating_point() or t.is_complex() else t.double() for t in (a, b))
    if a.shape != b.shape:
        difference, size = math.inf, 0.0
    else:
        difference = _largest((a - b)[a.isfinite() | b.isfinite()])
        size = _largest(a[a.isfinite()])
    if not difference <= 1e3 * torch.finfo(a.dtype).eps * size:
        raise RuntimeError(
            f"{what} is not deterministic: two evaluations of the same {where} differ by {difference:.1e}"
        )


def _largest(entries: Tensor) -> float:
    return float(entries.abs().max()) if entries.numel() else 0.0
