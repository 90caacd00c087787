"""Batches cut into smaller ones: to fit the processor's caches, or a device's memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from curvspace.curvature.linearisation import Batch, Point
from curvspace.curvature.memory import is_out_of_memory, kept_bytes
from curvspace.functional import select

Result = TypeVar("Result")

PILOT = 16
"""Examples that the pilot pass evaluates."""

CACHE_BYTES = 24 * 2**20
"""Activations of one forward pass that a processor works through without slowing down (measured, see benchmarks)."""


def split(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Batches of at most ``size`` examples; each part keeps its share of the batch's weight."""
    if size < 1:
        raise ValueError(f"microbatch must be at least 1, got {size}")
    parts = []
    for batch in batches:
        for start in range(0, batch.size, size):
            part = slice(start, min(start + size, batch.size))
            n = part.stop - start
            parts.append(
                replace(
                    batch,
                    inputs=select(batch.inputs, part),
                    targets=batch.targets[part],
                    weight=batch.weight * n / batch.size,
                    size=n,
                )
            )
    return parts


def cache_friendly_size(point: Point, batch: Batch) -> int:
    """How many examples to evaluate at a time on a CPU, a power of two, from the activations of a pilot pass."""
    (pilot, *_) = split([batch], PILOT)
    with torch.enable_grad(), kept_bytes() as kept:
        point.loss_of(point.outputs(pilot), pilot)
    per_example = max(1, kept.total(excluding=point.parameters) // pilot.size)
    return max(32, 1 << (CACHE_BYTES // per_example).bit_length() - 1)


def within_memory(
    compute: Callable[[list[Batch]], Result],
    batches: list[Batch],
    release: Callable[[], None] = lambda: None,
    *,
    divisible: bool = True,
) -> tuple[Result, list[Batch]]:
    """What ``compute`` makes of the batches, and the batches that fitted: halved whenever memory runs out.

    ``release`` gives up whatever is held, before each new attempt. The first time, a warning says what happened.
    """
    first = True
    while True:
        try:
            return compute(batches), batches
        except RuntimeError as error:
            largest = max(b.size for b in batches)
            if not is_out_of_memory(error) or largest == 1 or not divisible:
                raise
            message = str(error).splitlines()[0]
        release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batches = split(batches, (largest + 1) // 2)
        if first:
            warnings.warn(
                f"out of memory with {largest} examples at a time ({message}); going on with {(largest + 1) // 2}, "
                "or fewer if need be",
                RuntimeWarning,
                stacklevel=4,
            )
        first = False
