"""What models return: a tensor, or mappings, tuples and objects that hold tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def logits(outputs: Any, advice: str = "pass loss=callable(outputs, targets) that takes them as they are") -> Tensor:
    """The tensor among a model's outputs: itself, its ``logits``, or the only tensor that there is.

    Raises
    ------
    ValueError
        If that is not one tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    entries = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if isinstance(entries, list | tuple) and len(entries) == 1 and isinstance(entries[0], Tensor):
        return entries[0]
    raise ValueError(f"the model's outputs are a {type(outputs).__name__} without one tensor or .logits; {advice}")


def pack(outputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The floating-point tensors of a model's outputs as one, and the way back to the outputs' own form.

    One tensor stays as it is. Several become one vector.
    """
    if isinstance(outputs, Tensor):
        return outputs, lambda z: z
    found = [t for t in output_tensors(outputs) if t.is_floating_point()]
    if not found:
        raise ValueError(f"the model's outputs, a {type(outputs).__name__}, hold no floating-point tensor")
    sizes = [t.numel() for t in found]

    def unpack(z: Tensor) -> Any:
        parts = iter(z.split(sizes))
        return _rebuilt(outputs, lambda t: next(parts).view(t.shape).to(t.dtype) if t.is_floating_point() else t)

    return torch.cat([t.reshape(-1) for t in found]), unpack


def joined(parts: Sequence[Any], order: Tensor) -> Any:
    """Outputs of parts of a batch as those of the whole, in the outputs' own form: row i is row ``order[i]`` of all."""
    columns = iter(zip(*(output_tensors(part) for part in parts), strict=True))
    return _rebuilt(parts[0], lambda _: torch.cat(next(columns))[order])


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors that a model's outputs hold, in order."""
    found: list[Tensor] = []

    def visit(t: Tensor) -> Tensor:
        found.append(t)
        return t

    _rebuilt(outputs, visit)
    return found


def _rebuilt(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value``, of the same types, with ``f`` of each tensor in its place."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuilt(v, f) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_rebuilt(v, f) for v in value)
    if isinstance(value, Mapping):
        new = copy.copy(value)
        for k, v in value.items():
            new[k] = _rebuilt(v, f)  # type: ignore[index]
        return new
    if dataclasses.is_dataclass(value) or hasattr(value, "logits"):
        new = copy.copy(value)
        for k, v in vars(value).items():
            object.__setattr__(new, k, _rebuilt(v, f))
        return new
    return value
