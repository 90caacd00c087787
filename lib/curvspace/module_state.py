"""Modules are left as they were: whatever an evaluation sets or changes in them is undone."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvspace.tensors import bytes_of, version_of


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters and buffers of the model are these tensors, under all of their names.

    What ``torch.func.functional_call`` does, but the loss may read the model's parameters too, and a module that
    has two names keeps its own ``nn.Parameter`` objects (there they come back as plain tensors).

    Raises
    ------
    ValueError
        If a name is not one of the model's.
    """
    present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unknown = [name for name in tensors if name not in present]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no parameter or buffer named {unknown[0]!r}")
    replacements = {id(present[name]): tensor for name, tensor in tensors.items()}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if value is not None and id(value) in replacements:
                        swapped.append((store, name, value))
                        store[name] = replacements[id(value)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, value in swapped:
            store[name] = value


_LISTS = frozenset({list, tuple, dict, OrderedDict, defaultdict})

_HELD = frozenset({*_LISTS, set, deque, Tensor, np.ndarray})

_ITS_OWN = frozenset(nn.Module().__dict__)

_LARGEST, _LONGEST = 2**20, 1024
"""Bytes of a tensor, and entries of a list, up to which they are copied and looked through."""


def modules_within(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, and after them those that only its lists and dictionaries hold, unseen by PyTorch."""
    holdings, _ = _holdings(model)
    return list(holdings)


def _holdings(model: nn.Module) -> tuple[dict[nn.Module, list[tuple[str, Any]]], list[nn.Module]]:
    """For each of those modules what it holds beside parameters, buffers and modules and may change in place; and
    which of them are unseen."""
    found: dict[nn.Module, list[tuple[str, Any]]] = {module: [] for module in model.modules()}
    waiting, seen = list(found), len(found)
    for module in waiting:
        entries = module.__dict__
        found[module] = held = [(k, entries[k]) for k in entries.keys() - _ITS_OWN if type(entries[k]) in _HELD]
        for value in (v for _, v in held if type(v) in _LISTS):
            hidden = dict.fromkeys(m for m in _modules_in(value) if m not in found)
            found.update({m: [] for m in hidden})
            waiting += hidden
    return found, waiting[seen:]


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif type(value) in _LISTS and len(value) <= _LONGEST:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(entry)


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass inside sets or changes in place on the modules (caches, counters, lists, buffers anew) is
    undone on exit. Not in plain tensors beyond a mebibyte, of which a warning tells, nor in objects of other kinds."""
    holdings, hidden = _holdings(model)
    saved = [
        (module, dict(module.__dict__), dict(module._parameters), dict(module._buffers), dict(module._modules))
        for module in holdings
    ]
    copies: dict[int, Any] = {}
    large: list[tuple[str, Tensor, int]] = []
    for module, held in holdings.items():
        for name, value in held:
            module.__dict__[name] = _working_copy(value, copies)
            if type(value) is Tensor and module.__dict__[name] is value and not value.requires_grad:
                large.append((f"{type(module).__name__}.{name}", value, version_of(value)))
    for module in hidden:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, attributes, *stores in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            own: list[Any] = [module._parameters, module._buffers, module._modules]
            for store, entries in zip(own, stores, strict=True):
                store.clear()
                store.update(entries)
        for name, tensor, version in large:
            if version_of(tensor) != version:
                warnings.warn(
                    f"an evaluation has changed {name}, a plain tensor of {bytes_of(tensor) / 2**20:.1f} MiB that "
                    "forward writes, and cannot undo it: register it as a buffer",
                    RuntimeWarning,
                    stacklevel=2,
                )


@contextmanager
def left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules write into copies of their buffers, and what they set or change otherwise is undone on exit."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(preserved_attributes(module))
            stack.enter_context(substituted(module, {n: b.clone() for n, b in module.named_buffers()}))
        yield


def _working_copy(value: Any, copies: dict[int, Any]) -> Any:
    """A copy that may be changed in place, with what it holds; one of each object. Other things as they are."""
    kind = type(value)
    if kind not in _HELD:
        return value
    if id(value) not in copies:
        if kind is Tensor:
            copies[id(value)] = value if value.requires_grad or bytes_of(value) > _LARGEST else value.clone()
        elif kind is np.ndarray:
            copies[id(value)] = value if value.nbytes > _LARGEST else value.copy()
        elif kind is tuple and len(value) <= _LONGEST:
            copies[id(value)] = tuple(_working_copy(entry, copies) for entry in value)
        else:
            copies[id(value)] = copied = copy.copy(value)
            if kind in _LISTS and kind is not tuple and len(value) <= _LONGEST:
                for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    copied[key] = _working_copy(entry, copies)
    return copies[id(value)]


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever forward passes inside do to the buffers (running statistics), they leave as they were."""
    saved = [
        (module._buffers, name, b, b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for store, name, buffer, value in saved:
                store[name] = buffer
                buffer.copy_(value)
