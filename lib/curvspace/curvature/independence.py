"""Whether a model treats the examples of a batch one by one, and along which dimension they lie: tried on a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvspace.batches import has_uncut_examples, take
from curvspace.curvature.fingerprint import fingerprint
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.linearisation import Batch
from curvspace.curvature.memory import default_budget, is_out_of_memory, with_kept_bytes
from curvspace.differentiation import without_graph
from curvspace.inputs import Inputs, map_tensors, tensors_in
from curvspace.losses import Loss
from curvspace.outputs import plain_numbers, real_tensors

SAMPLE = 8
"""Examples on which it is tried whether a model treats examples one by one."""

REMEMBERED = 64
"""Answers kept for a model: of one that counts its calls, each is another."""

_known_independent: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def independent(function: FrozenModel, inputs: Inputs, size: int, flags: Sequence[bool]) -> bool:
    """Whether the model treats ``size`` examples one by one; ``flags`` as in :func:`~curvspace.batches.take`.

    So it seems on a few (:func:`seem_independent`), and the outputs of all agree to rounding with those of a few and of
    the rest apart: what passes between examples may need many of them (a capacity, a queue, groups, an outlier).
    """
    if not seem_independent(function, inputs, size, flags):
        return False
    return size <= SAMPLE or _remembered(_tried_on_all, function, inputs, size, flags, size)


def seem_independent(function: FrozenModel, inputs: Inputs, size: int, flags: Sequence[bool]) -> bool:
    """The same of a few examples, which cost next to nothing.

    They are evaluated together and in two parts, in float64 where the model can: outputs and a random combination of
    their gradients must agree, also at parameters moved at random, as a gate may be closed at the present ones.
    Something of each example that is no tensor is not cut, and rules it out.
    """
    if function.uses_batch_statistics or size < 2 or has_uncut_examples(inputs, size):
        return False
    return _remembered(_tried, function, inputs, size, flags, min(SAMPLE, size))


@torch.inference_mode(False)
def _remembered(
    trial: Callable[[FrozenModel, Inputs, int, Sequence[bool]], bool | None],
    function: FrozenModel,
    inputs: Inputs,
    size: int,
    flags: Sequence[bool],
    n: int,
) -> bool:
    """What a trial on n examples found, kept for a model, its modes and all that it holds and is called with beside its
    coordinates' values and the examples (see :mod:`~curvspace.curvature.fingerprint`)."""
    flags = tuple(flags[: len(tensors_in(inputs))])
    what = fingerprint(function.model, function.names, inputs, flags)
    if what is None:  # it could have changed since: tried each time
        return trial(function, inputs, size, flags) is not False
    key = (function.modes, tuple(function.names), function.dtype, flags, n, what)
    known = _known_independent.setdefault(function.model, {})
    if key not in known:
        found = trial(function, inputs, size, flags)
        if found is None:  # nothing learnt; nothing that is made of such outputs is finite, cut or not
            return True
        while len(known) >= REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = found
    return known[key]


def _tried_on_all(function: FrozenModel, inputs: Inputs, size: int, flags: Sequence[bool]) -> bool | None:
    """Without a graph, and of as many examples as memory surely holds."""
    low = function.dtype in (torch.float16, torch.bfloat16)
    function = function.in_dtype(torch.float32) if low else function
    theta, constants = function.parameters(), function.constants()

    def evaluated(part: slice) -> list[Tensor]:
        return real_tensors(function.evaluate(theta, constants, function.cast(take(inputs, part, flags))))

    try:
        with function.policy_in_force():
            with torch.enable_grad():
                few, kept = with_kept_bytes(lambda: evaluated(slice(0, SAMPLE)))
            if kept is None:
                return True
            bytes_of_few = kept.total(excluding=theta) + 3 * sum(z.nbytes for z in few)
            most = SAMPLE * default_budget(function.device) // max(1, bytes_of_few)
            if most < size:
                inputs, size = take(inputs, spread(size, max(most, SAMPLE)), flags), most
            if size <= SAMPLE:
                return True
            cuts = slice(0, SAMPLE), slice(SAMPLE, size), slice(0, size)
            parts = [without_graph(partial(evaluated, part)) for part in cuts]
    except Exception as error:  # the model's own: it shows again where the whole is evaluated
        return isinstance(error, RuntimeError) and is_out_of_memory(error)
    first, rest, whole = (torch.cat([z.reshape(len(z), -1) for z in part], dim=1) for part in parts)
    apart, finite = torch.cat([first, rest]), whole.isfinite()
    if not finite.any():
        return None
    rough = whole.dtype != torch.float64 and (
        function.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest"
    )
    tolerance = 0.02 if rough else 1e3 * torch.finfo(whole.dtype).eps
    return bool((finite == apart.isfinite()).all()) and nearly_equal(whole[finite], apart[finite], tolerance)


def _tried(function: FrozenModel, inputs: Inputs, size: int, flags: Sequence[bool]) -> bool | None:
    if not any(flags) or (function.device.type != "cpu" and may_index_examples(inputs, flags)):
        return False  # an index out of bounds would cost the whole device context
    for n in dict.fromkeys((min(SAMPLE, size), 2)):
        few = take(inputs, spread(size, n), flags)
        for dtype in dict.fromkeys((torch.float64, function.dtype)):
            try:
                return _same_here_and_elsewhere(function.in_dtype(dtype), few, n, flags)
            except Exception as error:  # the model's own: it shows again where the whole is evaluated
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    break
        else:
            return False
    return False


def _same_here_and_elsewhere(function: FrozenModel, inputs: Inputs, n: int, flags: Sequence[bool]) -> bool | None:
    eps, theta = torch.finfo(function.dtype).eps, function.parameters()
    found = _same_in_parts(function, theta, inputs, n, flags, 1e3 * eps)
    if not found:
        return found
    fan_in = [p[:1].numel() if p.ndim > 1 else 1 for p in theta]
    try:
        return _same_in_parts(function, elsewhere(theta, fan_in), inputs, n, flags, eps**0.5) is not False
    except Exception:  # the model's own: it need not be a function of any parameters
        return True


def require_examples_first(function: FrozenModel, batches: Sequence[Batch], loss: Loss) -> None:
    """Raise ``ValueError`` for sequences with time along the first dimension and the examples along the second, where
    the loss depends on how many examples there are: the model treats those along the second one by one."""
    shaped = [(b, shape) for b in batches if (shape := _sequences(b))]
    first = [loss.weight(b.targets, shape[0]) for b, shape in shaped]
    second = [loss.weight(_of_shape(b.targets, shape, lambda t: t.transpose(0, 1)), shape[1]) for b, shape in shaped]
    alike = all(math.isclose(f * second[0], s * first[0]) for f, s in zip(first, second, strict=True))
    if alike and (first == second or not loss.closed_form):
        return
    batch, shape = min(shaped, key=lambda pair: math.prod(pair[1]))
    flags = batch.flags[: len(tensors_in(batch.inputs))]
    if _apart_along_second(function, batch.inputs, shape) and not seem_independent(
        function, batch.inputs, batch.size, flags
    ):
        raise ValueError(
            f"batch {batch.index} seems to have {shape[1]} examples along the second dimension and {shape[0]} steps "
            "along the first: give inputs and targets with the examples along the first and let the model transpose "
            "them, or say that they are (batched=[0])"
        )


def _sequences(batch: Batch) -> tuple[int, int] | None:
    """The first two dimensions of targets and of an input alike, that is more than features of each example."""
    y = next((t for t in tensors_in(batch.targets) if t.ndim > 1 and not t.is_nested), None)
    if y is None or y.shape[0] != batch.size or y.shape[1] < 2:
        return None
    inputs = (t for t in tensors_in(batch.inputs) if not t.is_nested and (t.ndim > 2 or not t.is_floating_point()))
    return (y.shape[0], y.shape[1]) if any(t.shape[:2] == y.shape[:2] for t in inputs) else None


def _of_shape(value: Any, shape: tuple[int, int], f: Callable[[Tensor], Tensor]) -> Any:
    return map_tensors(lambda t: f(t) if not t.is_nested and tuple(t.shape[:2]) == shape else t, value)


def _apart_along_second(function: FrozenModel, inputs: Inputs, shape: tuple[int, int]) -> bool:
    """Whether outputs of a few of what is along the second dimension are those of the first of them and of the rest."""
    function = function.in_dtype(torch.float64)
    theta, constants = function.parameters(), function.constants()

    def evaluated(part: slice) -> list[Tensor]:
        few = _of_shape(inputs, shape, lambda t: t[:, part])
        return real_tensors(without_graph(lambda: function(theta, constants, function.cast(few))))

    try:
        whole, *parts = (evaluated(part) for part in (slice(0, 4), slice(0, 1), slice(1, 4)))
        apart = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
    except Exception:  # the model's own: it shows again where the whole is evaluated
        return False
    return all(nearly_equal(a, b, 1e-8) for a, b in zip(whole, apart, strict=True))


def spread(size: int, n: int) -> Tensor:
    """n of ``size`` positions, far apart."""
    return torch.linspace(0, size - 1, n, dtype=torch.float64, device="cpu").long()


@torch.no_grad()
def elsewhere(tensors: Sequence[Tensor], fan_in: Sequence[int]) -> tuple[Tensor, ...]:
    """Entries at random between a half and all of their sizes, which leaves them in their range; zeros become positive,
    and sum to about one over ``fan_in``."""
    generator, moved = torch.Generator().manual_seed(0), []
    for t, n in zip(tensors, fan_in, strict=True):
        u = torch.rand(t.shape, generator=generator, dtype=torch.float32, device="cpu").to(t)
        moved.append(torch.where(t.abs() < 1e-6, u / max(1, n), t * (1 + u) / 2).requires_grad_(t.requires_grad))
    return tuple(moved)


def _same_in_parts(
    function: FrozenModel, theta: Sequence[Tensor], inputs: Inputs, n: int, flags: Sequence[bool], tolerance: float
) -> bool | None:
    """Whether outputs and gradients agree, to a relative ``tolerance``, and plain numbers among the outputs are the
    same; None where no output is finite."""
    constants = function.constants()
    first = (n + 1) // 2

    numbers: list[list[int | float]] = []

    def evaluated(part: slice) -> tuple[Tensor, list[Tensor]]:
        raw = function.evaluate(theta, constants, function.cast(take(inputs, part, flags)))
        numbers.append(plain_numbers(raw))
        outputs = real_tensors(raw)
        if any(t.ndim == 0 or t.shape[0] != part.stop - part.start for t in outputs):
            raise ValueError("outputs without a batch dimension")
        z = torch.cat([t.reshape(t.shape[0], -1) for t in outputs], dim=1)
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(n, z.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(z)[part]
        finite = torch.where(z.isfinite(), z, 0)  # a class may be ruled out by a logit of minus infinity
        found = function.gradient((finite * u).sum(), theta)
        gradient = [torch.zeros_like(p) if g is None else g for g, p in zip(found, theta, strict=True)]
        if z.isfinite().any() and not all(g.isfinite().all() for g in gradient):
            raise ArithmeticError("gradients that are not finite")
        return z.detach(), gradient

    with torch.enable_grad(), function.policy_in_force():
        whole, of_whole = evaluated(slice(0, n))
        parts = [evaluated(slice(0, first)), evaluated(slice(first, n))]
    if numbers != [numbers[0]] * 3:
        return False
    if not whole.isfinite().any():
        return None
    apart, finite = torch.cat([z for z, _ in parts]), whole.isfinite()
    if not (finite == apart.isfinite()).all() or not nearly_equal(whole[finite], apart[finite], tolerance):
        return False
    summed = [a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)]
    return all(nearly_equal(a, b, tolerance) for a, b in zip(of_whole, summed, strict=True))


def nearly_equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max()) if a.numel() else True


def may_index_examples(inputs: Inputs, flags: Sequence[bool]) -> bool:
    """Whether integer inputs could be positions of examples: those of one dimension, or not cut with the batch."""
    whole_numbers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return any(
        t.dtype in whole_numbers and t.ndim > 0 and (t.ndim == 1 or not flag)
        for t, flag in zip(tensors_in(inputs), flags, strict=True)
    )
