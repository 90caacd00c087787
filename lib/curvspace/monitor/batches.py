"""The examples on which a monitor measures, where a framework and not the user draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvspace.batches import as_pairs, batch_size
from curvspace.inputs import Inputs, sequence_like

Pair = tuple[Inputs, Tensor]


def copied(value: Any) -> Any:
    """Tensors (also inside mappings and sequences) as detached copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return sequence_like(value, (copied(v) for v in value))
    return value


def unpacked(batch: Any) -> Pair:
    """Inputs and targets of a framework's batch: a pair, or a mapping with ``labels``.

    Raises
    ------
    ValueError
        For any other form.
    """
    try:
        return as_pairs([batch])[0]
    except ValueError as error:
        raise ValueError(
            f"{error}; pass unpack=function(batch) -> (inputs, targets), or batches=[(inputs, targets), ...]"
        ) from None


class FirstBatches:
    """The first few batches of a training, kept as copies."""

    def __init__(self, count: int, unpack: Callable[[Any], Pair] = unpacked):
        if count < 1:
            raise ValueError(f"num_batches must be at least 1, got {count}")
        self.count = count
        self.unpack = unpack
        self.pairs: list[Pair] = []

    @property
    def complete(self) -> bool:
        return len(self.pairs) >= self.count

    def add(self, batch: Any) -> None:
        if not self.complete:
            self.pairs.append(self.unpack(copied(batch)))


def own_loss(outputs: Any, targets: Tensor) -> Tensor:
    """The loss that a model itself returns; the targets are among its inputs.

    Raises
    ------
    ValueError
        If the model's output has no ``loss``.
    """
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError("the model returned no loss: give it labels, or pass loss= of logits and labels")
    return loss


def with_labels(inputs: Mapping[str, Any]) -> Pair:
    """All that a model is called with as its inputs, its labels among them; the targets only count the examples."""
    return inputs, torch.zeros(batch_size(inputs), device="cpu")
