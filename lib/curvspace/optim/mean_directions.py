r"""The span of the units' mean directions in closed form: no matrix, however many units there are.

A weight tensor with r output units (its first dimension) and c entries a unit (all others) has r directions, one for
each unit: :math:`1/\sqrt c` on the unit's entries, zero elsewhere. They are orthonormal; along them lies the mean of
a unit's weights over its inputs, and taking them out of a gradient subtracts from each unit's part its mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from curvspace.optim.span import Span, orthonormal_span


@dataclass(frozen=True)
class MeanSpan(Span):
    r"""The span for tensors of these ``shapes``, in the order in which they stand in the flat vector (P,).

    Tensors of one dimension have no mean direction. Nor have those with a single entry a unit, where the mean would
    be the whole gradient and the layer would stand still.
    """

    shapes: tuple[torch.Size, ...] = ()

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """Of each tensor that has mean directions: where it starts, its units r, the entries c of a unit."""
        starts = accumulate((s.numel() for s in self.shapes), initial=0)
        found = [(start, s[0], s[1:].numel()) for start, s in zip(starts, self.shapes, strict=False) if len(s) > 1]
        return [(start, r, c) for start, r, c in found if r > 0 and c > 1]

    @property
    def size(self) -> int:
        return sum(r for _, r, _ in self.segments)

    def coordinates(self, vector: Tensor) -> Tensor:
        parts = [matrix.sum(-1) / math.sqrt(matrix.shape[-1]) for matrix in self._matrices(vector)]
        return torch.cat(parts) if parts else vector.new_zeros(0)

    def combine(self, coefficients: Tensor) -> Tensor:
        total = coefficients.new_zeros(sum(s.numel() for s in self.shapes))
        parts = coefficients.split([r for _, r, _ in self.segments])
        for matrix, part in zip(self._matrices(total), parts, strict=True):
            matrix.copy_((part / math.sqrt(matrix.shape[-1]))[:, None].expand_as(matrix))
        return total

    def reject(self, vector: Tensor) -> Tensor:
        r""":math:`v - QQ^\top v` for a vector (P,), or for each of several rows (m, P)."""
        rest = vector.clone()
        for matrix in self._matrices(rest):
            matrix -= matrix.mean(-1, keepdim=True)
        return rest

    def directions(self) -> Tensor:
        raise ValueError("mean directions have no matrix of directions: use Drop or Scale within their span")

    def matrix(self) -> Tensor:
        """Q (P, k), dense and in float64: for small networks, to look at."""
        return torch.stack([self.combine(e) for e in torch.eye(self.size, dtype=torch.float64)], dim=1)

    def _matrices(self, vector: Tensor) -> Iterator[Tensor]:
        """Each tensor's part of a vector (P,), or of rows (m, P), as a view (..., r, c)."""
        for start, r, c in self.segments:
            yield vector[..., start : start + r * c].unflatten(-1, (r, c))


@dataclass(frozen=True)
class SumSpan(Span):
    """The orthogonal sum of the mean directions and a span of a few rows, first freed of their part in them."""

    means: MeanSpan = MeanSpan((), torch.empty(0, 0), orthonormal=True)

    @property
    def size(self) -> int:
        return self.means.size + self.mix.shape[1]

    def coordinates(self, vector: Tensor) -> Tensor:
        return torch.cat([self.means.coordinates(vector), super().coordinates(vector)])

    def combine(self, coefficients: Tensor) -> Tensor:
        first, rest = coefficients.split([self.means.size, self.mix.shape[1]])
        return self.means.combine(first) + super().combine(rest)

    def reject(self, vector: Tensor) -> Tensor:
        rest = self.means.reject(vector)
        return rest - super().combine(super().coordinates(rest))

    def directions(self) -> Tensor:
        return self.means.directions()

    def matrix(self) -> Tensor:
        return torch.cat([self.means.matrix().to(self.mix), super().directions() @ self.mix], dim=1)


def mean_span(shapes: Iterable[Sequence[int]]) -> MeanSpan:
    """The mean directions of tensors of these shapes, which lie one after the other in the flat vector."""
    return MeanSpan((), torch.empty(0, 0), orthonormal=True, shapes=tuple(torch.Size(s) for s in shapes))


def joint_span(spans: Sequence[Span]) -> Span:
    """The orthonormal sum of spans, the mean directions (if among them) in closed form."""
    means = next((span for span in spans if isinstance(span, MeanSpan)), None)
    blocks = [block for span in spans for block in span.blocks]
    if means is None:
        return orthonormal_span(blocks)
    if not blocks:
        return means
    rest = orthonormal_span([means.reject(block) for block in blocks])
    return SumSpan(rest.blocks, rest.mix, orthonormal=True, means=means)
