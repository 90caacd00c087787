"""A batch class by class: which inputs are cut, how large the classes are, and their members."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvspace.batches import Batched, batch_flags, batch_size, fit, number_of_examples, take
from curvspace.curvature.fingerprint import fingerprint
from curvspace.curvature.frozen import BatchNorm, FrozenModel
from curvspace.curvature.independence import REMEMBERED, independent
from curvspace.curvature.layerwise import LayerRecorder, add_class_gradients, agrees_with_autograd, moves_examples
from curvspace.inputs import Inputs, call
from curvspace.module_state import preserved_buffers
from curvspace.outputs import logits


def splits_exactly(
    model: nn.Module, x: Inputs, y: Any, *, batched: Batched = None, batch_norm: BatchNorm = None
) -> bool:
    """Whether the model treats the examples one by one, so that a batch may be split by class, or a part of it taken.

    Tried once for a model and its modes, on a few examples; see :func:`~curvspace.curvature.independence.independent`.
    """
    n = number_of_examples(x, y)
    return n == 1 or independent(FrozenModel(model, batch_norm), x, n, batch_flags(x, n, batched))


def require_part_exact(model: nn.Module, x: Inputs, y: Any, fraction: float, *, batch_norm: BatchNorm = None) -> None:
    """Raise ``ValueError`` where the first examples of a batch alone would be another function of the parameters.

    Batch statistics are those of the part: beside them, examples are to be treated one by one.
    """
    n = number_of_examples(x, y)
    if not any(batch_flags(x, n)):
        if fit(x, y):
            raise ValueError(
                f"fraction={fraction} of a batch cannot be taken: no input is a tensor with the examples along "
                "their first dimension; use fraction=1"
            )
        raise ValueError(f"a batch of {batch_size(x)} inputs has {n} targets")
    if FrozenModel(model, batch_norm).uses_batch_statistics:
        batch_norm = "running"
        if FrozenModel(model, batch_norm).uses_batch_statistics:  # there are no others, behind which nothing is seen
            return
    if splits_exactly(model, x, y, batch_norm=batch_norm):
        return
    raise ValueError(
        f"fraction={fraction} of a batch would be another function: {type(model).__name__} does not treat "
        "examples one by one; use fraction=1"
    )


def number_of_classes(model: nn.Module, x: Inputs) -> int:
    """C by the model's outputs (N, C); its buffers stay as they are.

    Raises ``ValueError`` for outputs of another form.
    """
    with preserved_buffers(model), torch.no_grad():
        z = logits(call(model, x), "class gradients need one tensor (N, C)")
    if z.ndim != 2:
        raise ValueError(f"the model's outputs have shape {tuple(z.shape)}; class gradients need (N, C)")
    return z.shape[1]


_known_layers: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
"""For a model, as it is and is called: whether its class gradients come right layer by layer."""


def known_layers(function: FrozenModel, way: str, x: Inputs, flags: Sequence[bool]) -> tuple[dict[Any, bool], Any]:
    """What is remembered of a model, and the key of its present state; nothing where a change could not be seen."""
    what = fingerprint(function.model, function.names, x, flags)
    if what is None:
        return {}, None
    known = _known_layers.setdefault(function.model, {})
    while len(known) >= REMEMBERED:
        known.pop(next(iter(known)))
    return known, (way, function.modes, tuple(function.names), what)


def add_layer_by_layer(
    recorder: LayerRecorder,
    own: Tensor,
    sizes: list[int],
    order: Tensor | None,
    parameters: Sequence[Tensor],
    c: Tensor,
    differentiated: Callable[[Tensor], Tensor] | None,
) -> bool | None:
    """Add the examples' part of the class gradients to c; False, and c is as it was, where that cannot be done.

    own (N,) is of :func:`own_logits`, with its graph, which is kept; ``sizes`` are of the classes in these examples;
    ``order`` sorts them by class, None if they are sorted. With ``differentiated``, autograd's gradient of a scalar, it
    is tried before whether that can be done, of which None says that nothing was learnt.
    """
    if not recorder.complete or moves_examples(own, len(own)):
        return False
    right = agrees_with_autograd(recorder.layers, own, parameters, differentiated) if differentiated else True
    if right is not False:
        rows = [c[k] for k, size in enumerate(sizes) if size]
        add_class_gradients(recorder.layers, own.sum(), [size for size in sizes if size], order, parameters, rows)
    return right


def own_logits(z: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    r""":math:`z^i_{y_i} / |B_{y_i}|` of each example (N,): the sum over a class has the class gradient."""
    return z.gather(1, y.long()[:, None])[:, 0] / counts[y.long()]


def class_layout(x: Inputs, y: Tensor, num_classes: int, batched: Batched) -> tuple[tuple[bool, ...], list[int]]:
    """Which inputs are cut with the batch, and the sizes of the classes."""
    sizes = class_sizes(y, num_classes)
    flags = batch_flags(x, len(y), batched)
    if batched is None and not fit(x, y):
        raise ValueError(f"a batch of {batch_size(x)} inputs has {len(y)} targets")
    return flags, sizes


def class_sizes(y: Tensor, num_classes: int) -> list[int]:
    """Of each class, how many examples it has: known to the host after waiting for a device once."""
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
        found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"class gradients need integer targets of shape (N,), got {found}")
    if len(y) == 0:
        raise ValueError("a batch of class gradients is empty")
    y = y.long().cpu()
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        ignored = "; leave out examples without a class, such as labels of -100" if low < 0 else ""
        raise ValueError(f"targets must be in 0..{num_classes - 1}, got {low}..{high}{ignored}")
    return torch.bincount(y, minlength=num_classes).tolist()


def class_counts(sizes: list[int], y: Tensor) -> Tensor:
    """The sizes as a tensor (C,) where the targets are."""
    return torch.tensor(sizes, device=y.device)


def class_members(y: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Each class present, with the positions of its examples."""
    parts = torch.argsort(y, stable=True).split(sizes)
    yield from ((k, part) for k, part in enumerate(parts) if len(part))


def by_class(x: Inputs, y: Tensor, sizes: list[int], flags: Sequence[bool]) -> Iterator[tuple[int, Tensor, Inputs]]:
    """Each class present, with the positions of its examples and their inputs (sorted once, then views)."""
    ordered = take(x, torch.argsort(y, stable=True), flags)
    start = 0
    for k, members in class_members(y, sizes):
        part = slice(start, start + len(members))
        yield k, members, take(ordered, part, flags)
        start += len(members)


def checked_logits(outputs: Any, num_classes: int, size: int | None = None) -> Tensor:
    """The logits (N, C) among a model's outputs, or an error that says what they are instead."""
    z = logits(outputs, "class gradients need one tensor (N, C)")
    if z.ndim != 2 or z.shape[1] != num_classes or (size is not None and z.shape[0] != size):
        raise ValueError(f"the model's outputs have shape {tuple(z.shape)}; class gradients need (N, {num_classes})")
    return z
