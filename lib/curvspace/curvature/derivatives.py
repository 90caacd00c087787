r"""Whether autograd's gradient of a model is the derivative of its loss, which curvature supposes.

It is not where a part is cut off (``detach``, ``no_grad``), where a function brings a derivative of its own
(straight-through, gradient reversal, hooks), and for two options of ``nn.Embedding``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvspace.curvature.fingerprint import fingerprint
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.linearisation import Batch, Point
from curvspace.curvature.memory import free_memory
from curvspace.curvature.split import _may_index_examples
from curvspace.functional import tensors_in, without_graph
from curvspace.losses import Loss

EXAMPLES = 4
"""On so many the derivative is tried."""

LARGEST = 30_000_000
"""Parameters up to which it is tried on a CPU, where it costs as much as a few products with a small batch."""

STEPS = (1e-4, 1e-5)
"""Of the central differences, relative to the parameters."""

TOLERANCE = 1e-4
"""What the two derivatives may differ by, relative to what that in a random direction is on average."""

_tried: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def compare_derivatives(function: FrozenModel, loss: Loss, batch: Batch) -> None:
    """Once per model: its gradient along a random direction and a difference of losses, in float64.

    What cannot be tried (no float64, too little memory, too many parameters for a CPU, a model that refuses a few
    examples) is taken to be right.

    Warns
    -----
    RuntimeWarning
        If they differ: curvature is then the derivative of autograd's gradient, and the loss's own is another.

    Raises
    ------
    ValueError
        If an ``nn.Embedding`` scales its gradient by frequency, or scales its rows back to ``max_norm``.
    """
    _refuse_embeddings(function)
    names = [name for name, _ in function.model.named_parameters()]
    flags = batch.flags[: len(tensors_in(batch.inputs))]
    key = (function.modes, tuple(function.names), loss.name, fingerprint(function.model, names, batch.inputs, flags))
    known = _tried.setdefault(function.model, set())
    if key in known:
        return
    known.add(key)
    name = type(function.model).__name__
    shared = _sharing(function.model, function.names)
    if shared:
        warnings.warn(
            f"{name}: the parameters {shared[0]} and {shared[1]} lie in the same memory but are two objects; here they "
            "are independent coordinates: for one shared weight assign the same nn.Parameter to both",
            RuntimeWarning,
            stacklevel=6,
        )
    found = _differing(function, loss, batch)
    if found is not None:
        warnings.warn(
            f"{name} with the loss {loss.name}: autograd's gradient is not the derivative of the loss: along a random "
            f"direction it is {found.of_autograd:.3g}, and the loss changes at {found.of_loss:.3g} (detach, no_grad or "
            "a function with a derivative of its own?); curvature will be the derivative of autograd's gradient, "
            "not of the loss",
            RuntimeWarning,
            stacklevel=6,
        )


def _refuse_embeddings(function: FrozenModel) -> None:
    for name, module in _embeddings(function):
        what = None
        if module.scale_grad_by_freq:
            what = "scale_grad_by_freq=True: it divides its gradient by how often a row occurs"
        elif module.max_norm is not None and _reaches(module.weight, module.max_norm, module.norm_type):
            what = f"max_norm={module.max_norm:g}, which rows of it reach: its gradient leaves out that they are scaled"
        if what is not None:
            raise ValueError(
                f"{type(function.model).__name__}: the embedding {name!r} has {what}, so that it is no derivative of "
                "the loss; unset the option for curvature, or leave the embedding out (parameters=…)"
            )


@torch.no_grad()
def _reaches(weight: Tensor, bound: float, order: float) -> bool:
    return bool((weight.detach().double().norm(order, dim=1) > bound * (1 - 1e-3)).any())


def _sharing(model: nn.Module, names: list[str]) -> tuple[str, str] | None:
    """Two of the parameters that overlap in memory."""
    found = dict(model.named_parameters())
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes, repr(name))
        for name, p in ((n, found[n]) for n in names)
        if p.numel() and p.layout == torch.strided and p.is_contiguous()
    )
    overlapping = ((a[2], b[2]) for a, b in pairwise(spans) if a[0] and b[0] < a[1])
    return next(overlapping, None)


@dataclass(frozen=True)
class _Slopes:
    of_autograd: float
    of_loss: float


def _differing(function: FrozenModel, loss: Loss, batch: Batch) -> _Slopes | None:
    """The derivatives in a direction where they differ, at two points one after the other, and None otherwise."""
    flags = batch.flags[: len(tensors_in(batch.inputs))]
    enough = function.device.type != "mps" and free_memory(function.device) > 100 * function.size
    on_cpu = function.device.type == "cpu"
    if not enough or (function.size > LARGEST if on_cpu else _may_index_examples(batch.inputs, flags)):
        return None
    found = None
    try:
        few = batch.examples(torch.linspace(0, batch.size - 1, min(EXAMPLES, batch.size)).long())
        point = Point.here(function.in_dtype(torch.float64), loss)
        for seed in range(2):
            found = _slopes(point, few, torch.Generator().manual_seed(seed))
            if found is None:
                return None
    except Exception:  # the model's own, which shows where it is evaluated in earnest
        return None
    return found


def _slopes(point: Point, batch: Batch, generator: torch.Generator) -> _Slopes | None:
    """At parameters near the present ones, which may be too special; None where a jump or rounding explains it."""
    scales = list(_scales(point.parameters))
    away, along = (_direction(point, scales, generator) for _ in range(2))

    def at(step: float) -> Point:
        moved = (p.detach() + 0.01 * a + step * d for p, a, d in zip(point.parameters, away, along, strict=True))
        return replace(point, parameters=tuple(p.requires_grad_() for p in moved))

    def value(step: float) -> float:
        return float(without_graph(lambda: at(step).value(batch)))

    here = at(0.0)
    with torch.enable_grad():
        loss = here.value(batch)
        gradient = point.function.gradient(loss, here.parameters)
    terms = [(g, d, s) for g, d, s in zip(gradient, along, scales, strict=True) if g is not None]
    slope = float(sum((g * d).sum() for g, d, _ in terms))
    typical = float(sum((g * s).square().sum() for g, _, s in terms)) ** 0.5
    # outputs of order one: a loss that is nearly 0 is the difference of such
    rounding = 1e4 * torch.finfo(torch.float64).eps * max(1.0, abs(float(loss.detach()))) / STEPS[-1]
    found: list[float] = []
    for step in STEPS:
        found.append((value(step) - value(-step)) / (2 * step))
        if not abs(found[-1] - slope) > max(TOLERANCE * typical, rounding):
            return None
    agree = abs(found[0] - found[1]) < 0.02 * abs(found[1] - slope)
    return _Slopes(slope, found[1]) if agree else None


def _direction(point: Point, scales: list[float], generator: torch.Generator) -> list[Tensor]:
    """A random one in units of the scales. Rows that an embedding keeps for padding are constants by its definition."""
    parts = [
        scale * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for p, scale in zip(point.parameters, scales, strict=True)
    ]
    chosen = _chosen(point.function)
    for _, module in _embeddings(point.function):
        if module.padding_idx is not None:
            parts[list(chosen).index(id(module.weight))][module.padding_idx] = 0
    return parts


def _chosen(function: FrozenModel) -> dict[int, str]:
    """The coordinates' names, in order, by the parameters' identities."""
    found = dict(function.model.named_parameters())
    return {id(found[name]): name for name in function.names}


def _embeddings(function: FrozenModel) -> list[tuple[str, Any]]:
    chosen = _chosen(function)
    kinds = nn.Embedding | nn.EmbeddingBag
    return [(n, m) for n, m in function.model.named_modules() if isinstance(m, kinds) and id(m.weight) in chosen]


def _scales(parameters: tuple[Tensor, ...]) -> Iterator[float]:
    """The size of each parameter's entries; of zeros that of all."""
    total = sum(float(p.detach().square().sum()) for p in parameters)
    overall = (total / max(1, sum(p.numel() for p in parameters))) ** 0.5 or 1.0
    for p in parameters:
        yield float(p.detach().square().mean() ** 0.5) if p.numel() and p.detach().any() else overall
