"""What modules keep beside their parameters, and evaluations leave as it was: attributes, buffers, lists, counters."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvspace.tensors import bytes_of, version_of

LISTS = frozenset({list, tuple, dict, OrderedDict, defaultdict})
HELD = frozenset({*LISTS, set, deque, Tensor, np.ndarray})
_ITS_OWN = frozenset(nn.Module().__dict__)

_LARGEST, LONGEST = 2**20, 1024
"""Bytes of a tensor, and entries of a list, up to which they are copied and looked through."""

_ALL = 2**26
_ENTRIES = 10_000
_DEEPEST = 100
"""Bytes of tensors, entries of lists, and lists within lists, that are copied or looked through for one evaluation."""


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
        found[module] = held = [(k, entries[k]) for k in entries.keys() - _ITS_OWN if type(entries[k]) in HELD]
        for value in (v for _, v in held if type(v) in LISTS):
            hidden = dict.fromkeys(m for m in _modules_in(value) if m not in found)
            found.update({m: [] for m in hidden})
            waiting += hidden
    return found, waiting[seen:]


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """The modules in nested lists and dictionaries, as far as those may be looked through."""
    waiting, seen, entries = deque([value]), {id(value)}, 0
    while waiting:
        held = waiting.popleft()
        if issubclass(type(held), nn.Module):
            yield from held.modules()
        elif type(held) in LISTS and len(held) <= LONGEST and (entries := entries + len(held)) <= _ENTRIES:
            inside = [v for v in (held.values() if isinstance(held, dict) else held) if id(v) not in seen]
            seen.update(map(id, inside))
            waiting.extend(v for v in inside if type(v) in LISTS or issubclass(type(v), nn.Module))


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass inside sets or changes in place on the modules (caches, counters, lists, buffers anew) is
    undone on exit. Not in plain tensors beyond a mebibyte, of which a warning tells, nor in objects of other kinds."""
    holdings, hidden = _holdings(model)
    saved = [
        (module, dict(module.__dict__), dict(module._parameters), dict(module._buffers), dict(module._modules))
        for module in holdings
    ]
    copies = Copies()
    for module, held in holdings.items():
        for name, value in held:
            module.__dict__[name] = working_copy(value, copies, f"{type(module).__name__}.{name}")
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
        copies.warn_of_changes()


@contextmanager
def left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules write into copies of their buffers, and what they set or change otherwise is undone on exit."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(preserved_attributes(module))
            stack.enter_context(substituted(module, {n: b.clone() for n, b in module.named_buffers()}))
        yield


class Copies(dict[int, Any]):
    """Copies by the identity of what was copied, and what was too large for it, with a mark that tells changes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.entries = 0
        self.uncopied: list[tuple[Any, Callable[[Any], int], int, str]] = []

    def have_room(self, container: Any, name: str) -> bool:
        cost = len(container) if len(container) <= LONGEST else len(container) // 32  # which is not looked through
        if self.entries + cost > _ENTRIES:
            what = f"{name}, a {type(container).__name__} of {len(container)} entries, and cannot undo it: keep fewer"
            self.uncopied.append((container, len, len(container), what))
            return False
        self.entries += cost
        return True

    def of_tensor(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.requires_grad:
            return tensor
        size = bytes_of(tensor)
        if size > _LARGEST or self.bytes + size > _ALL:
            kind = f"a plain tensor of {size / 2**20:.1f} MiB that forward writes"
            what = f"{name}, {kind}, and cannot undo it: register it as a buffer"
            self.uncopied.append((tensor, version_of, version_of(tensor), what))
            return tensor
        self.bytes += size
        return tensor.clone()

    def warn_of_changes(self) -> None:
        for held, mark, before, what in self.uncopied:
            if mark(held) != before:
                warnings.warn(f"an evaluation has changed {what}", RuntimeWarning, stacklevel=3)


def working_copy(value: Any, copies: Copies, name: str, depth: int = 0) -> Any:
    """A copy that may be changed in place, with what it holds; one of each object. Other things as they are.

    ``name``: where it is held.
    """
    kind = type(value)
    if kind not in HELD or depth > _DEEPEST:
        return value
    if id(value) not in copies:
        if kind is Tensor:
            copies[id(value)] = copies.of_tensor(value, name)
        elif kind is np.ndarray:
            copies[id(value)] = value if value.nbytes > _LARGEST else value.copy()
        elif not copies.have_room(value, name):
            copies[id(value)] = value
        elif kind is tuple:
            copies[id(value)] = tuple(working_copy(entry, copies, name, depth + 1) for entry in value)
        else:
            copies[id(value)] = copied = copy.copy(value)
            if kind in LISTS and len(value) <= LONGEST:
                for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    copied[key] = working_copy(entry, copies, name, depth + 1)
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


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters and buffers of the model are these tensors, under all of their names.

    What ``torch.func.functional_call`` does, but the loss may read the model's parameters too, a module that has two
    names keeps its own ``nn.Parameter`` objects (there they come back as plain tensors), and the tensors have the
    types and attributes of those for which they stand.

    Raises
    ------
    ValueError
        If a name is not one of the model's.
    """
    present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unknown = [name for name in tensors if name not in present]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no parameter or buffer named {unknown[0]!r}")
    replacements = {id(present[name]): alike(tensor, present[name]) for name, tensor in tensors.items()}
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


def alike(tensor: Tensor, original: Tensor) -> Tensor:
    """The tensor, or a view of it, with the type and the attributes of another one, which a model may look at.

    Types whose numbers lie in attributes (with a ``__torch_dispatch__``) are those of the operations' results.
    """
    wraps = type(original).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if type(tensor) is not type(original) and not wraps:
        tensor = tensor.as_subclass(type(original))
    for name, value in vars(original).items():
        vars(tensor).setdefault(name, value)
    return tensor
