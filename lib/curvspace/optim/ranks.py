r"""The processes of a ``DistributedDataParallel`` model, each with its shard of every minibatch.

Whatever an optimiser computes from its shard (a loss, a gradient, a product, an inner product of outputs) is the mean
over the shard. What it goes on with is the mean over all shards,

.. math:: \bar v = \sum_r \frac{n_r}{N} v_r, \qquad N = \sum_r n_r,

whatever their sizes: the same number, bit for bit, in every process. With a weighted loss :math:`n_r` is the weight
of the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvspace.batches import number_of_examples
from curvspace.inputs import Inputs
from curvspace.losses import Loss


@dataclass(frozen=True)
class Ranks:
    """``group`` is None for a process alone, whose means are the values themselves."""

    group: Any = None
    broadcast_buffers: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> tuple[nn.Module, Ranks]:
        """The module inside a data-parallel wrapper (any other as it is), and its processes.

        Raises
        ------
        ValueError
            For a wrapper that shards the parameters or spreads a batch over devices of one process.
        """
        name = type(model).__name__
        if isinstance(model, nn.parallel.DistributedDataParallel):
            ranks = cls(model.process_group, model.broadcast_buffers)
            return model.module, ranks if dist.get_world_size(ranks.group) > 1 else cls()
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError("the model is a DataParallel; wrap it in DistributedDataParallel, or pass model.module")
        if name.startswith("FSDP") or name == "FullyShardedDataParallel" or _sharded(model):
            raise ValueError(f"{name} shards the parameters, which a step needs whole; use DistributedDataParallel")
        return model, cls()

    @property
    def alone(self) -> bool:
        return self.group is None

    def share(self, loss: Loss, inputs: Inputs, targets: Any, device: torch.device) -> float:
        """The part :math:`n_r/N` of this process's shard, by what the loss counts; 1 for a loss that is a sum.

        Raises
        ------
        ValueError
            In every process, if a shard is empty.
        """
        if self.alone:
            return 1.0
        size = loss.weight(targets, number_of_examples(inputs, targets))
        given = torch.zeros(dist.get_world_size(self.group), dtype=torch.float64, device=device)
        given[dist.get_rank(self.group)] = size
        dist.all_reduce(given, group=self.group)
        sizes = given.tolist()
        if min(sizes) <= 0:
            raise ValueError(f"rank {sizes.index(min(sizes))} has no example in its shard of the minibatch")
        return 1.0 if loss.reduction == "sum" else size / sum(sizes)

    def mean(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """The means of tensors over all shards, each in its shape and type."""
        return list(tensors) if self.alone else self.total([t * share for t in tensors])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all processes, each in its shape and type."""
        if self.alone:
            return list(tensors)
        together = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(together, group=self.group)
        parts = together.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Which flags are set in at least one process."""
        if self.alone:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(counts, group=self.group)
        return [bool(count) for count in counts.tolist()]

    @torch.no_grad()
    def equalise_buffers(self, model: nn.Module) -> None:
        """Running statistics, which each process has from its own shard, become those of the first one.

        ``DistributedDataParallel`` does the same before each forward pass, if its ``broadcast_buffers`` says so.
        """
        if not self.alone and self.broadcast_buffers:
            source = dist.get_global_rank(self.group, 0)
            for buffer in model.buffers():
                dist.broadcast(buffer, source, group=self.group)


def _sharded(model: nn.Module) -> bool:
    return any(type(p).__name__ == "DTensor" for p in model.parameters())
