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
    """The real and complex numbers of a model's outputs as one real tensor, and the way back to the outputs' own form.

    One real tensor stays as it is. Several, or a complex one, become one vector.
    """
    if isinstance(outputs, Tensor) and not outputs.is_complex():
        return outputs, lambda z: z
    found = real_tensors(outputs)
    if not found:
        raise ValueError(
            f"no floating-point tensor is found in the model's outputs, a {type(outputs).__name__}: they may be one, "
            "or a tuple, mapping or dataclass of tensors"
        )
    sizes = [t.numel() for t in found]

    def unpack(z: Tensor) -> Any:
        parts = iter(z.split(sizes))

        def back(t: Tensor) -> Tensor:
            if t.is_complex():
                return torch.complex(*next(parts).view(*t.shape, 2).to(t.real.dtype).unbind(-1))
            return next(parts).view(t.shape).to(t.dtype) if t.is_floating_point() else t

        return map_outputs(outputs, back)

    return torch.cat([t.reshape(-1) for t in found]), unpack


def joined(parts: Sequence[Any], order: Tensor) -> Any:
    """Outputs of parts of a batch as those of the whole, in the outputs' own form: row i is row ``order[i]`` of all."""
    columns = iter(zip(*(output_tensors(part) for part in parts), strict=True))
    return map_outputs(parts[0], lambda _: torch.cat(next(columns))[order])


def rows(outputs: Any, start: int, stop: int) -> Any:
    """The same of some examples, which are along the first dimension of each tensor."""
    return map_outputs(outputs, lambda t: t[start:stop])


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors that a model's outputs hold, in order."""
    found: list[Tensor] = []

    def visit(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_outputs(outputs, visit)
    return found


def real_tensors(outputs: Any) -> list[Tensor]:
    """Those of real numbers, and complex ones with real and imaginary parts along a last dimension."""
    found = (torch.stack([t.real, t.imag], -1) if t.is_complex() else t for t in output_tensors(outputs))
    return [t for t in found if t.is_floating_point()]


def plain_numbers(outputs: Any) -> list[int | float]:
    """The numbers that outputs hold beside tensors, in order: a count of the examples, a mean by ``.item()``."""
    if isinstance(outputs, int | float):
        return [outputs]
    if isinstance(outputs, Mapping):
        return plain_numbers(list(outputs.values()))
    if isinstance(outputs, list | tuple):
        return [number for entry in outputs for number in plain_numbers(entry)]
    if not isinstance(outputs, Tensor) and (dataclasses.is_dataclass(outputs) or hasattr(outputs, "logits")):
        return plain_numbers(vars(outputs))
    return []


def with_leaves(outputs: Any) -> tuple[Any, list[Tensor]]:
    """A copy of outputs whose real and complex tensors are leaves that require gradients, and these."""
    found: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not (t.is_floating_point() or t.is_complex()):
            return t
        found.append(t.detach().requires_grad_())
        return found[-1]

    return map_outputs(outputs, leaf), found


def map_outputs(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value``, of the same types, with ``f`` of each tensor in its place."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_outputs(v, f) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_outputs(v, f) for v in value)
    if isinstance(value, Mapping):
        new = copy.copy(value)
        for k, v in value.items():
            new[k] = map_outputs(v, f)  # type: ignore[index]
        return new
    if dataclasses.is_dataclass(value) or hasattr(value, "logits"):
        new = copy.copy(value)
        for k, v in vars(value).items():
            object.__setattr__(new, k, map_outputs(v, f))
        return new
    return value
