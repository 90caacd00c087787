r"""The span of the units' mean directions in closed form: no matrix, however many units there are.

A weight tensor with r output units (its first dimension) and c entries a unit (all others) has r directions, one for
each unit: :math:`1/\sqrt c` on the unit's entries, zero elsewhere. They are orthonormal; along them lies the mean of
a unit's weights over its inputs, and taking them out of a gradient subtracts from each unit's part its mean. The kernel
of a transposed convolution of G groups is (inputs, outputs / G, ...), the inputs of a group one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from curvspace.optim.span import Span, orthonormal_span

ENTRIES = (-3, -1)
"""The dimensions of a part (..., g, i, o, k) that run over the entries of a unit."""


@dataclass(frozen=True)
class MeanSpan(Span):
    r"""The span for tensors of these ``shapes``, in the order in which they stand in the flat vector (P,).

    ``transposed``: of each tensor the groups of the transposed convolution whose kernel it is, or 0. Tensors of one
    dimension have no mean direction. Nor have those with a single entry a unit, where the mean would be the whole
    gradient and the layer would stand still.
    """

    shapes: tuple[torch.Size, ...] = ()
    transposed: tuple[int, ...] = ()

    @cached_property
    def segments(self) -> list[tuple[int, tuple[int, int, int, int]]]:
        """Of each tensor that has mean directions: where it starts, and its layout."""
        starts = accumulate((s.numel() for s in self.shapes), initial=0)
        tensors = zip(starts, self.shapes, self.transposed, strict=False)
        found = [(start, layout(s, groups)) for start, s, groups in tensors if len(s) > 1]
        return [(start, (g, i, o, k)) for start, (g, i, o, k) in found if g * o > 0 and i * k > 1]

    @property
    def size(self) -> int:
        return sum(self._units)

    @property
    def _units(self) -> list[int]:
        return [g * o for _, (g, _, o, _) in self.segments]

    def coordinates(self, vector: Tensor) -> Tensor:
        parts = [part.sum(ENTRIES).flatten() / _root(part) for part in self._parts(vector)]
        return torch.cat(parts) if parts else vector.new_zeros(0)

    def combine(self, coefficients: Tensor) -> Tensor:
        total = coefficients.new_zeros(sum(s.numel() for s in self.shapes))
        for part, own in zip(self._parts(total), coefficients.split(self._units), strict=True):
            part.copy_((own / _root(part)).view(part.shape[0], 1, part.shape[2], 1).expand_as(part))
        return total

    def reject(self, vector: Tensor) -> Tensor:
        r""":math:`v - QQ^\top v` for a vector (P,), or for each of several rows (m, P)."""
        rest = vector.clone()
        for part in self._parts(rest):
            part -= part.mean(ENTRIES, keepdim=True)
        return rest

    def directions(self) -> Tensor:
        raise ValueError("mean directions have no matrix of directions: use Drop or Scale within their span")

    def matrix(self) -> Tensor:
        """Q (P, k), dense and in float64: for small networks, to look at."""
        return torch.stack([self.combine(e) for e in torch.eye(self.size, dtype=torch.float64, device="cpu")], dim=1)

    def _parts(self, vector: Tensor) -> Iterator[Tensor]:
        """Each tensor's part of a vector (P,), or of rows (m, P), as a view (..., g, i, o, k)."""
        for start, form in self.segments:
            yield vector[..., start : start + math.prod(form)].unflatten(-1, form)


@dataclass(frozen=True)
class SumSpan(Span):
    """The orthogonal sum of the mean directions and a span of a few rows, first freed of their part in them."""

    means: MeanSpan = MeanSpan((), torch.empty(0, 0, device="cpu"), orthonormal=True)

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


def layout(shape: Sequence[int], groups: int) -> tuple[int, int, int, int]:
    """(g, i, o, k) of a weight tensor: g times o units, each with i times k entries."""
    if groups:
        return groups, shape[0] // groups, shape[1], math.prod(shape[2:])
    return shape[0], 1, 1, math.prod(shape[1:])


def transposed_groups(model: nn.Module) -> dict[Tensor, int]:
    """The groups of each transposed convolution by its kernel, or by what a parametrisation makes the kernel of."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)]
    kernels = [(m, (m.in_channels, m.out_channels // m.groups, *m.kernel_size)) for m in layers]
    return {p: m.groups for m, shape in kernels for p in m.parameters() if p.shape == shape}


def mean_span(shapes: Iterable[Sequence[int]], transposed: Sequence[int] | None = None) -> MeanSpan:
    """The mean directions of tensors of these shapes, which lie one after the other in the flat vector.

    ``transposed``: see :class:`MeanSpan`; None: no tensor is a transposed convolution's.
    """
    sizes = tuple(torch.Size(s) for s in shapes)
    groups = tuple(transposed or [0] * len(sizes))
    return MeanSpan((), torch.empty(0, 0, device="cpu"), orthonormal=True, shapes=sizes, transposed=groups)


def _root(part: Tensor) -> float:
    return math.sqrt(part.shape[-3] * part.shape[-1])


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
