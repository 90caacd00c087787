"""What models are called with: a tensor, or tuples and mappings that nest tensors, whose examples can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor (``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``)."""


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
