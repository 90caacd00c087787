"""The examples on which a monitor measures, where a framework and not the user draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.functional import Inputs, batch_size

Pair = tuple[Inputs, Tensor]


def copied(value: Any) -> Any:
    """Tensors (also inside mappings and sequences) as detached copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(copied(v) for v in value)
    return value


def unpacked(batch: Any) -> Pair:
    """Inputs and targets of a framework's batch: a pair, or a mapping with ``labels``.

    Raises
    ------
    ValueError
        For any other form.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    form = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"a batch is (inputs, targets) or a mapping with 'labels', got {form}; "
        "pass unpack=function(batch) -> (inputs, targets), or batches=[(inputs, targets), ...]"
    )


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


class OwnLoss(nn.Module):
    """A model that returns its own loss, as a function whose output is that loss.

    Raises
    ------
    ValueError
        From a call, if the model's output has no ``loss``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        loss = getattr(self.model(**inputs), "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(self.model).__name__} returned no loss: give it labels, or pass loss= and batches="
            )
        return loss

    @staticmethod
    def of(output: Tensor, targets: Tensor) -> Tensor:
        """The loss function of an objective on this module."""
        return output

    @staticmethod
    def pair(inputs: Mapping[str, Any]) -> Pair:
        """All the model's inputs, its labels among them, and what counts as targets: one number an example."""
        return inputs, torch.zeros(batch_size(inputs))


class Logits(nn.Module):
    """A model whose outputs have ``.logits``, as a function whose output they are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = self.model(*args, **kwargs)
        return getattr(outputs, "logits", outputs)
