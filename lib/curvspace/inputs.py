"""What models are called with: a tensor, or tuples and mappings that nest tensors, whose examples can be cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``)."""

Batched = Collection[int | str] | None
"""Which inputs have the batch as their first dimension, by position or name; ``None``: those of that length."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(x)``, ``model(*x)`` or ``model(**x)`` for a tensor (or an object of another kind, or a packed sequence),
    a tuple, a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def map_tensors(f: Callable[[Tensor], Any], value: Any) -> Any:
    """``f`` of each tensor of a value that may nest tuples, lists and mappings; other things as they are."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(f, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple_like(value, (map_tensors(f, v) for v in value))
    return value


def tuple_like(value: Sequence[Any], entries: Iterable[Any]) -> tuple[Any, ...]:
    """The entries as a tuple, with the names that a named tuple ``value`` gives them."""
    make: Callable[[Iterable[Any]], tuple[Any, ...]] = getattr(value, "_make", tuple)
    return make(entries)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value that may nest tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def batch_size(value: Any) -> int:
    """Number of examples: the first dimension of the first tensor that has one, among inputs or targets.

    Raises
    ------
    ValueError
        If there is no such tensor.
    """
    for tensor in tensors_in(value):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError("a batch holds no tensor with a first dimension, so its number of examples is unknown")


def batch_flags(value: Any, size: int, batched: Batched = None) -> tuple[bool, ...]:
    """Which tensors of inputs (or targets) have ``size`` examples along their first dimension, in order.

    Those in the entries that ``batched`` names by position or key; without it, those whose first dimension is ``size``
    and that are not sparse (a sparse one has a row an example where it joins examples: a graph).

    Raises
    ------
    ValueError
        If there is no such entry, or it is not ``size`` long, or no tensor.
    """
    if batched is None:
        return tuple(t.layout is torch.strided and t.ndim > 0 and t.shape[0] == size for t in tensors_in(value))
    entries = dict(value) if isinstance(value, Mapping) else dict(enumerate(value if _is_sequence(value) else [value]))
    unknown = [key for key in batched if key not in entries]
    if unknown:
        raise ValueError(f"batched names {unknown[0]!r}, but the inputs are {list(entries)}")
    flags: list[bool] = []
    for key, entry in entries.items():
        if key in batched and has_uncut_examples(entry, size):
            raise ValueError(f"batched names {key!r}, which holds what is no tensor: only tensors are cut, make it one")
        for t in tensors_in(entry):
            if key in batched and (t.ndim == 0 or t.shape[0] != size):
                raise ValueError(f"batched names {key!r} of shape {tuple(t.shape)}, but there are {size} targets")
            flags.append(key in batched)
    return tuple(flags)


def take(value: Any, index: Tensor | slice, flags: Sequence[bool]) -> Any:
    """The examples ``index`` of inputs or targets: tensors with a flag are cut, the others (masks, scalars) stay."""
    remaining = iter(flags)

    def one(t: Tensor) -> Tensor:
        if not next(remaining):
            return t
        return t[index.to(t.device) if isinstance(index, Tensor) else index]

    return map_tensors(one, value)


def has_uncut_examples(value: Any, size: int) -> bool:
    """Whether inputs hold something of each of ``size`` examples that is no tensor (a list of lengths, an array), which
    :func:`take` leaves whole."""
    if isinstance(value, Tensor | str | bytes) or getattr(value, "ndim", 1) == 0:
        return False
    if isinstance(value, Sized) and len(value) == size and not tensors_in(value):
        return True
    entries = value.values() if isinstance(value, Mapping) else value if _is_sequence(value) else ()
    return any(has_uncut_examples(entry, size) for entry in entries)


def select(value: Any, index: Tensor | slice, *, size: int | None = None, batched: Batched = None) -> Any:
    """The examples ``index`` of inputs (or targets) of ``size`` examples, by default that of the first tensor."""
    return take(value, index, batch_flags(value, batch_size(value) if size is None else size, batched))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple)
