r"""Whether autograd's gradient of a model is the derivative of its loss, which curvature supposes.

It is not where a part is cut off (``detach``, ``no_grad``), where a function brings a derivative of its own
(straight-through, gradient reversal, hooks), and for two options of ``nn.Embedding``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvspace.curvature.fingerprint import fingerprint
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.independence import may_index_examples, spread
from curvspace.curvature.linearisation import (
    Batch,
    GaussNewtonLinearisation,
    HessianLinearisation,
    NotLinear,
    Point,
)
from curvspace.curvature.memory import free_memory
from curvspace.differentiation import without_graph
from curvspace.inputs import tensors_in
from curvspace.losses import Loss
from curvspace.outputs import pack

EXAMPLES = 4
"""On so many the derivative is tried."""

LARGEST = 30_000_000
"""Parameters up to which it is tried on a CPU, where it costs as much as a few products with a small batch."""

STEPS = (1e-4, 1e-5)
"""Of the central differences, relative to the parameters."""

SECOND_STEPS = (1e-6, 1e-7)
"""The same where gradients are compared: short, as they jump at kinks, of which a line crosses many."""

Matrix = Literal["Hessian", "Gauss-Newton", "Fisher"] | None
"""Whose second derivatives are tried."""

TOLERANCE = 1e-4
"""What the two derivatives may differ by, relative to what that in a random direction is on average."""

_tried: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
"""Of a model as it is: whether its gradient is the loss's derivative; with a matrix, that its second ones are right."""


def compare_derivatives(function: FrozenModel, loss: Loss, batch: Batch, matrix: Matrix = None) -> None:
    """Once per model and matrix: its gradient along a random direction and a difference of losses, in float64; and what
    the matrix takes of second derivatives, and differences of first ones.

    What cannot be tried (too little memory, too many parameters for a CPU, a model that refuses a few examples) is
    taken to be right.

    Warns
    -----
    RuntimeWarning
        If they differ: curvature is then the derivative of autograd's gradient, and the loss's own is another.

    Raises
    ------
    ValueError
        If an ``nn.Embedding`` scales its gradient by frequency, or scales its rows back to ``max_norm``.
    RuntimeError
        If the gradient is right and its derivative is not.
    """
    _refuse_embeddings(function)
    names = [name for name, _ in function.model.named_parameters()]
    flags = batch.flags[: len(tensors_in(batch.inputs))]
    held = fingerprint(function.model, names, batch.inputs, flags)
    key = (function.modes, tuple(function.names), loss.name, held)
    known = _tried.setdefault(function.model, {})
    if key in known and (matrix is None or (*key, matrix) in known):
        return
    tried = _few(function, loss, batch)
    if key not in known:
        found = _differing(*tried) if tried else None
        known[key] = found is None
        _warn(function, loss, found)
    if tried and matrix:
        if known[key]:
            _require_second_derivative(*tried, matrix)
        elif matrix != "Hessian":
            _require_jacobian(*tried)
        known[(*key, matrix)] = True


def _warn(function: FrozenModel, loss: Loss, found: _Slopes | None) -> None:
    name = type(function.model).__name__
    shared = _sharing(function.model, function.names)
    if shared:
        what = f"parameters {shared[0]} and {shared[1]} lie in the same memory but are two objects"
        advice = "for one shared weight assign the same nn.Parameter to both, and read it where it is used in its shape"
        if shared[0] == shared[1]:
            what = f"entries of the parameter {shared[0]} lie in the same memory (expand)"
            advice = "hold what is expanded as the parameter, and expand it where it is used"
        warnings.warn(
            f"{name}: the {what}; here they are independent coordinates: {advice}",
            RuntimeWarning,
            stacklevel=7,
        )
    if found is not None:
        warnings.warn(
            f"{name} with the loss {loss.name}: autograd's gradient is not the derivative of the loss: along a random "
            f"direction it is {found.of_autograd:.3g}, and the loss changes at {found.of_loss:.3g} (detach, no_grad or "
            "a function with a derivative of its own?); curvature will be the derivative of autograd's gradient, "
            "not of the loss",
            RuntimeWarning,
            stacklevel=7,
        )


def _require_second_derivative(point: Point, batch: Batch, matrix: Matrix) -> None:
    found = _second_derivative_off(point, batch, matrix)
    if found is not None:
        what, off = found
        other = "take objective.hessian_by_differences()" if matrix == "Hessian" else "write it in torch's operations"
        wrong = "not finite" if math.isinf(off) else f"off by {off:.1%} of the difference of first derivatives"
        raise RuntimeError(
            f"{type(point.function.model).__name__} with the loss {point.loss.name}: {what} is {wrong}, though first "
            "derivatives are right: a backward pass is not one that autograd can "
            f"differentiate (a function or hook of its own, in NumPy, a kernel, or without a graph?); {other}"
        )


def _require_jacobian(point: Point, batch: Batch) -> None:
    """Also where the gradient is not the loss's derivative, the backward pass is to be a linear map."""
    try:
        GaussNewtonLinearisation(point, batch, diverged=True).jacobian.require_linear()
    except NotLinear:
        raise
    except Exception:  # the model's own, or torch's where it has none, which shows where it is evaluated in earnest
        return


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
    """Two of the parameters that overlap in memory, or twice one whose own entries do (``expand``)."""
    found = dict(model.named_parameters())
    held = [(found[n].data_ptr(), repr(n), found[n].detach()) for n in names if found[n].layout == torch.strided]
    reaching: list[tuple[str, Tensor]] = []
    for start, name, p in sorted((h for h in held if h[0] and h[2].numel()), key=lambda h: h[:2]):
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            return name, name
        reaching = [(n, q) for n, q in reaching if q.data_ptr() + q.itemsize * _extent(q) > start]
        for n, q in reaching:
            if _meet(q, p):
                return n, name
        reaching.append((name, p))
    return None


def _extent(p: Tensor) -> int:
    """Entries of memory from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _meet(p: Tensor, q: Tensor) -> bool:
    """Whether tensors from overlapping stretches of memory have an entry in common: they may be interleaved."""
    if all(t.numel() == _extent(t) for t in (p, q)) or p.itemsize != q.itemsize:
        return True

    def places(t: Tensor) -> Tensor:
        at = torch.tensor(t.data_ptr() // t.itemsize, device="cpu")
        for size, stride in zip(t.shape, t.stride(), strict=True):
            at = at[..., None] + stride * torch.arange(size, device="cpu")
        return at.reshape(-1)

    return bool(torch.isin(places(p), places(q)).any())


@dataclass(frozen=True)
class _Slopes:
    of_autograd: float
    of_loss: float


def _few(function: FrozenModel, loss: Loss, batch: Batch) -> tuple[Point, Batch] | None:
    """Where and on which examples derivatives are tried; None where that cannot be."""
    flags = batch.flags[: len(tensors_in(batch.inputs))]
    enough = free_memory(function.device) > 100 * function.size
    on_cpu = function.device.type == "cpu"
    if not enough or (function.size > LARGEST if on_cpu else may_index_examples(batch.inputs, flags)):
        return None
    few = batch.examples(spread(batch.size, min(EXAMPLES, batch.size)))
    return Point.here(function.in_dtype(torch.float64), loss), replace(few, weight=1.0)


def _differing(point: Point, batch: Batch) -> _Slopes | None:
    """The derivatives in a direction where they differ, at two points one after the other, and None otherwise."""
    found = None
    try:
        for seed in range(2):
            found = _slopes(point, batch, torch.Generator().manual_seed(seed))
            if found is None:
                return None
    except Exception:  # the model's own, which shows where it is evaluated in earnest
        return None
    return found


class _Line:
    """Parameters along a random line, from a point near the present one, which may be too special."""

    def __init__(self, point: Point, generator: torch.Generator):
        self.scales = list(_scales(point.parameters))
        self.away, self.along = (_direction(point, self.scales, generator) for _ in range(2))
        self.point = point

    def at(self, step: float) -> Point:
        pairs = zip(self.point.parameters, self.away, self.along, strict=True)
        moved = (p.detach() + 0.01 * a + step * d for p, a, d in pairs)
        return replace(self.point, parameters=tuple(p.requires_grad_() for p in moved))


def _slopes(point: Point, batch: Batch, generator: torch.Generator) -> _Slopes | None:
    """None where a jump or rounding explains a difference."""
    line = _Line(point, generator)

    def value(step: float) -> float:
        return float(without_graph(lambda: line.at(step).value(batch)))

    here = line.at(0.0)
    with torch.enable_grad():
        loss = here.value(batch)
        gradient = here.gradient(loss)
    terms = [(g, d, s) for g, d, s in zip(gradient, line.along, line.scales, strict=True) if g is not None]
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


def _second_derivative_off(point: Point, batch: Batch, matrix: Matrix) -> tuple[str, float] | None:
    """Which derivative of a derivative is wrong in a random direction, and by how much relative to differences."""
    try:
        line = _Line(point, torch.Generator().manual_seed(0))
        if matrix == "Hessian":
            off = _hessian_off(line, batch)
            return None if off is None else ("a product with the Hessian", off)
        found = GaussNewtonLinearisation(line.at(0.0), batch, diverged=True)
        found.jacobian.require_linear()
        off = _jacobian_off(line, batch, found)
        if off is not None:
            return "the derivative of the outputs (J v, from the derivative of the backward pass)", off
        off = _loss_off(line, batch, found) if matrix == "Gauss-Newton" else None
        return None if off is None else ("the second derivative of the loss in the outputs", off)
    except NotLinear:
        raise
    except Exception:  # the model's own, or torch's where it has none, which shows where it is evaluated in earnest
        return None


def _hessian_off(line: _Line, batch: Batch) -> float | None:
    product = HessianLinearisation(line.at(0.0), batch).product(line.along)

    def gradient(step: float) -> list[Tensor]:
        here = line.at(step)
        with torch.enable_grad():
            found = here.gradient(here.value(batch))
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, here.parameters, strict=True)]

    return _off(product, gradient, line.scales)


def _jacobian_off(line: _Line, batch: Batch, linearisation: GaussNewtonLinearisation) -> float | None:
    jv = linearisation.jacobian.forward(line.along)
    return _off([jv], lambda step: [without_graph(lambda: pack(line.at(step).outputs(batch))[0])], [1.0])


def _loss_off(line: _Line, batch: Batch, linearisation: GaussNewtonLinearisation) -> float | None:
    curvature = linearisation.curvature
    if curvature.closed_form:
        return None
    u = linearisation.jacobian.forward(line.along).detach()
    hu, own = curvature.product(u, line.along)

    def gradient(step: float) -> list[Tensor]:
        here, kept = line.at(step), []

        def moved(raw: Any) -> Any:
            _, unpack = pack(raw)
            kept.append((curvature.z.detach() + step * u).requires_grad_())
            return unpack(kept[0])

        with torch.enable_grad():
            _, loss = here.evaluate(batch, moved)
        of = [kept[0], *(here.parameters[i] for i in curvature.read)]
        return list(torch.autograd.grad(loss, of, materialize_grads=True))

    return _off([hu, *own], gradient, [1.0, *(line.scales[i] for i in curvature.read)])


def _off(product: Sequence[Tensor], values: Callable[[float], list[Tensor]], scales: Sequence[float]) -> float | None:
    """How far a product is from differences of what it is the derivative of, in units of these, infinity where only
    these are finite; None where they agree, or a jump or rounding explains it."""

    def size(parts: Iterable[Tensor]) -> float:
        return sum(float((s * p.detach()).square().sum()) for s, p in zip(scales, parts, strict=True)) ** 0.5

    def minus(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[Tensor]:
        return (x - y for x, y in zip(a, b, strict=True))

    found: list[list[Tensor]] = []
    off = 0.0
    if not math.isfinite(size(product)):
        return math.inf if math.isfinite(size(values(SECOND_STEPS[0]))) else None
    for step in SECOND_STEPS:
        there = values(step)
        rounding = 1e3 * torch.finfo(torch.float64).eps * max(1.0, size(there)) / step
        found.append([d / (2 * step) for d in minus(there, values(-step))])
        off = size(minus(found[-1], product))
        if not off > max(1e-3 * size(found[-1]), rounding):
            return None
    return off / size(found[-1]) if size(minus(*found)) < 0.02 * off else None


def _direction(point: Point, scales: list[float], generator: torch.Generator) -> list[Tensor]:
    """A random one in units of the scales. Rows that an embedding keeps for padding are constants by its definition."""
    parts = [
        scale * torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p.device)
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
