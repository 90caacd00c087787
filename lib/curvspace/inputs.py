"""What models are called with: a tensor, or tuples and mappings that nest tensors, whose examples can be cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``)."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(x)``, ``model(*x)`` or ``model(**x)`` for a tensor (or an object of another kind, or a packed sequence),
    a tuple, a mapping. A model that writes into its inputs gets copies of them."""
    inputs = copies_of(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})


def all_plain(value: Any) -> bool:
    """Whether a list, tuple or dictionary holds numbers and words only: told at once, however long it is."""
    kind = type(value)
    return kind in (list, tuple, dict) and _PLAIN.issuperset(map(type, value.values() if kind is dict else value))


def map_tensors(f: Callable[[Tensor], Any], value: Any) -> Any:
    """``f`` of each tensor of a value that may nest tuples, lists and mappings; other things as they are."""
    if isinstance(value, Tensor):
        return f(value)
    if all_plain(value):
        return copy.copy(value)
    if isinstance(value, Mapping):
        return mapping_like(value, {k: map_tensors(f, v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return sequence_like(value, (map_tensors(f, v) for v in value))
    return value


def copies_of(value: Any) -> Any:
    """The same with copies of the tensors, lists and mappings in it, into which others may write. A tensor that
    requires gradients stays, as others may differentiate by it."""
    return map_tensors(lambda t: t if t.requires_grad else t.clone(), value)


def mapping_like(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    """The entries in a mapping of the same type, or in a dictionary where that cannot be copied and written."""
    if type(value) is dict:
        return entries
    try:
        new: Any = copy.copy(value)
        for key, entry in entries.items():
            new[key] = entry
    except Exception:  # the type's own
        return entries
    return new


def sequence_like(value: Sequence[Any], entries: Iterable[Any]) -> Sequence[Any]:
    """The entries as a list or a tuple, as ``value`` is, with the names that a named tuple gives them."""
    make: Callable[[Iterable[Any]], Sequence[Any]] = getattr(value, "_make", list if type(value) is list else tuple)
    return make(entries)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value that may nest tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found
