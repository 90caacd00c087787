"""Batches cut into smaller ones: to fit the processor's caches, or a device's memory.

Only where that does not change the function: the model treats examples one by one (tried on a few), and the loss is a
weighted mean over them (known, or whole and parts compared).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvspace.batches import has_uncut_examples
from curvspace.curvature.independence import elsewhere, independent, nearly_equal
from curvspace.curvature.left_behind import moved, reads_calls, unless_it_fails
from curvspace.curvature.linearisation import Batch, Point, mean_gradient
from curvspace.curvature.memory import is_out_of_memory, let_go, with_kept_bytes
from curvspace.differentiation import without_graph
from curvspace.losses import Loss
from curvspace.outputs import joined, map_outputs, output_tensors, rows, with_leaves

Result = TypeVar("Result")

PILOT = 16
"""Examples that the pilot pass evaluates."""

CACHE_BYTES = 24 * 2**20
"""Activations of one forward pass that a processor works through without slowing down (measured, see benchmarks)."""


def split(batches: Sequence[Batch], size: int, loss: Loss) -> list[Batch]:
    """Batches of at most ``size`` examples; each part has its share of the batch's weight, those without any go."""
    if size < 1:
        raise ValueError(f"microbatch must be at least 1, got {size}")
    parts = []
    for batch in batches:
        if batch.size <= size:
            parts.append(batch)
            continue
        whole = loss.weight(batch.targets, batch.size)
        for start in range(0, batch.size, size):
            part = batch.examples(slice(start, min(start + size, batch.size)))
            weight = loss.weight(part.targets, part.size)
            if weight:
                parts.append(replace(part, weight=batch.weight * (weight / whole)))
    return parts


def cut(point: Point, batches: Sequence[Batch], size: int) -> list[Batch] | None:
    """Batches of at most ``size`` examples that make the same function; None where cutting would change it."""
    if point.function.examples_interact:
        return None
    parts: list[Batch] = []
    for batch in batches:
        if batch.size > size:
            if has_uncut_examples(batch.targets, batch.size):
                return None
            if not independent(point.function, batch.inputs, batch.size, batch.flags):
                return None
            pieces = split([batch], size, point.loss)
            if not (point.loss.adds_up(batch.targets) or _adds_up(point, batch, pieces)):
                return None
            parts += pieces
        else:
            parts.append(batch)
    return parts


@torch.no_grad()
def _adds_up(point: Point, batch: Batch, parts: Sequence[Batch]) -> bool:
    """Whether the loss of a batch is the weighted sum of its parts', in value and in gradient by the outputs.

    Also at outputs moved at random, as whole and parts may agree to first order at the present ones; of a loss that
    reads what a call of the model leaves behind in value and gradient by the parameters, with the model called.
    """
    outputs = [without_graph(partial(point.outputs, part)) for part in parts]
    tensors = [output_tensors(z) for z in outputs]
    if not tensors[0] or any(t.ndim == 0 or len(t) != p.size for ts, p in zip(tensors, parts, strict=True) for t in ts):
        return False
    low = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors[0])
    exact = point.function.in_dtype(torch.float32) if low else point.function
    z = joined(outputs, torch.arange(batch.size, device="cpu"))
    theta = tuple(exact.cast(p.detach()).requires_grad_() for p in point.parameters) if low else point.parameters
    there, z = replace(point, function=exact, parameters=theta), map_outputs(z, exact.cast)
    try:
        if reads_calls(there, parts):
            return _same_when_called(there, batch, parts)
        if not _sum_of_parts(there, z, batch, parts):
            return False
    except Exception:  # the loss's own: weights of every example inside, a check of lengths
        return False
    z, leaves = with_leaves(z)
    others = iter(elsewhere([*leaves, *theta], [1] * (len(leaves) + len(theta))))
    z = map_outputs(z, lambda t: next(others) if t.requires_grad else t)
    try:
        return _sum_of_parts(replace(there, parameters=tuple(others)), z, batch, parts) is not False
    except Exception:  # the loss's own: it need not take any outputs
        return True


def _same_when_called(point: Point, batch: Batch, parts: Sequence[Batch]) -> bool:
    """Whether the loss and its gradient by the parameters are the weighted sums of those of the parts, here and at
    parameters moved at random."""

    def summed(here: Point, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([b.weight * without_graph(partial(here.value, b)) for b in batches]).sum()

    def same(here: Point) -> bool:
        value, tolerance = summed(here, [batch]), 1e3 * torch.finfo(here.function.dtype).eps
        if not value.isfinite() or not nearly_equal(value, summed(here, parts), tolerance):
            return False
        return nearly_equal(mean_gradient(here, [batch]), mean_gradient(here, parts), tolerance)

    return same(point) and unless_it_fails(same, moved(point)) is not False


def _sum_of_parts(point: Point, z: Any, batch: Batch, parts: Sequence[Batch]) -> bool | None:
    """The same at outputs z of the whole batch; None where the loss is not finite."""
    ends = list(accumulate(p.size for p in parts))
    with point.function.at(point.parameters, point.constants):
        value, gradient = _loss_and_slope(point, z, batch)
        of_parts = [_loss_and_slope(point, rows(z, end - p.size, end), p) for p, end in zip(parts, ends, strict=True)]
    if not (value.isfinite() and all(g.isfinite().all() for g in gradient)):
        return None
    shares = [p.weight / batch.weight for p in parts]
    tolerance = 1e3 * torch.finfo(point.function.dtype).eps
    total = sum(share * v for share, (v, _) in zip(shares, of_parts, strict=True))
    slopes = zip(*([share * g for g in gs] for share, (_, gs) in zip(shares, of_parts, strict=True)), strict=True)
    same = (nearly_equal(g, torch.cat(pieces), tolerance) for g, pieces in zip(gradient, slopes, strict=True))
    return bool((value - total).abs() <= tolerance * value.abs()) and all(same)


def _loss_and_slope(point: Point, z: Any, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        z, leaves = with_leaves(z)
        value = point.loss_of(z, batch)
        return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)


def cache_friendly_size(point: Point, batch: Batch) -> int:
    """How many examples to evaluate at a time on a CPU, a power of two, from the activations of a pilot pass."""
    pilot = batch.examples(slice(0, min(PILOT, batch.size)))
    with torch.enable_grad():
        _, kept = with_kept_bytes(lambda: point.value(pilot))
    if kept is None:
        return batch.size
    per_example = max(1, kept.total(excluding=point.parameters) // pilot.size)
    return max(32, 1 << (CACHE_BYTES // per_example).bit_length() - 1)


def within_memory(
    compute: Callable[[list[Batch]], Result],
    batches: list[Batch],
    point: Callable[[], Point],
    release: Callable[[], None] = lambda: None,
) -> tuple[Result, list[Batch]]:
    """What ``compute`` makes of the batches, and the batches that fitted: halved whenever memory runs out.

    ``release`` gives up whatever is held, before each new attempt. The first time, a warning says what happened. Where
    cutting would change the function at ``point()``, memory's end stays an error.
    """
    first = True
    while True:
        try:
            return compute(batches), batches
        except RuntimeError as error:
            largest = max(b.size for b in batches)
            if not is_out_of_memory(error) or largest == 1:
                raise
            message, half = str(error).splitlines()[0], (largest + 1) // 2
            let_go(error)
            release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            smaller = _cut_within_memory(point(), batches, half)
            if smaller is None:
                raise
            batches = smaller
        if first:
            warnings.warn(
                f"out of memory with {largest} examples at a time ({message}); going on with {half}, "
                "or fewer if need be",
                RuntimeWarning,
                stacklevel=4,
            )
        first = False


def _cut_within_memory(point: Point, batches: list[Batch], size: int) -> list[Batch] | None:
    """As :func:`cut`, with parts small enough to compare the loss of whole and parts."""
    while True:
        try:
            return cut(point, batches, size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size = (size + 1) // 2
