"""What a model's function depends on besides the values of its coordinates, as a key: equal keys, same function.

Everything that the modules hold counts: their types, hooks, plain attributes, constants and buffers. What is read
elsewhere (global variables) is not seen.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.weak import WeakIdKeyDictionary

from curvspace.inputs import Inputs
from curvspace.tensors import version_of

ENTRIES = 20_000
"""Values that are looked at for one key, at most."""

VALUES = 1024
"""Entries up to which an input tensor that is not cut with the batch is compared by value."""

_PLAIN: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, range, slice, type, types.ModuleType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_numbers = count()
_number_of = WeakIdKeyDictionary()
_OWN_TO_MODULES = {*nn.Module().__dict__, "_compiled_call_impl"} - {"_forward_hooks", "_forward_pre_hooks"}


class _Unknown(Exception):
    """A value of which it cannot be told whether it has changed."""


def fingerprint(model: nn.Module, coordinates: Collection[str], inputs: Inputs, flags: Sequence[bool]) -> Any:
    """A hashable key of the model and of what it is called with, or None where something cannot be told.

    The values of the parameters named by ``coordinates`` and of the examples (tensors with a flag) do not count, nor do
    running statistics, which each training step moves: they scale and shift every example alike.
    """
    look = _Look()
    try:
        modules = tuple((name, look.module(m)) for name, m in model.named_modules(remove_duplicate=False))
        others = tuple((n, look.tensor(p)) for n, p in model.named_parameters() if n not in coordinates)
        moving = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
        buffers = tuple((n, look.tensor(b)) for n, b in model.named_buffers() if id(b) not in moving)
        remaining = iter(flags)
        given = look.nested(inputs, lambda t: _of_input(t, next(remaining)))
        key = (modules, others, buffers, given)
        hash(key)
    except Exception:  # _Unknown, or what an object raises that is looked at
        return None
    return key


@torch.no_grad()
def values_mark(tensors: Sequence[Tensor]) -> Any:
    """A key that changes with the tensors' values: by versions and norms, as ``.data`` is written without a version."""
    versions = tuple((id(t), version_of(t)) for t in tensors)
    return versions, tuple(torch.stack(torch._foreach_norm([t.detach().float() for t in tensors])).tolist())


class _Look:
    """One look at everything that is held, each object once."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # the objects too: an identity is one as long as they live
        self.entries = 0

    def module(self, module: nn.Module) -> Any:
        kind = type(module)
        own = {k: v for k, v in module.__dict__.items() if k not in _OWN_TO_MODULES}
        self.first(module)
        return kind, getattr(kind, "forward", None), _of_classes(kind), self.value(own)

    def first(self, value: Any) -> None:
        self.seen.setdefault(id(value), (len(self.seen), value))

    def tensor(self, t: Tensor) -> Any:
        """By identity and how often it was changed in place; what a call has left behind with its graph is none."""
        if t.grad_fn is not None:
            return "computed"
        if t.is_inference():
            raise _Unknown
        if t not in _number_of:
            _number_of[t] = next(_numbers)
        return _number_of[t], t._version, t.dtype, None if t.is_nested else t.shape

    def count(self, entries: int) -> None:
        self.entries += entries
        if self.entries > ENTRIES:
            raise _Unknown

    def value(self, value: Any) -> Any:
        self.count(1)
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, Tensor):
            return self.tensor(value)
        if id(value) in self.seen:
            return "seen", self.seen[id(value)][0]
        self.first(value)
        if isinstance(value, nn.Module):  # outside of the tree
            stores = (value._parameters, value._buffers, value._modules)
            return self.module(value), *(self.value(dict(store)) for store in stores)
        if isinstance(value, types.MethodType):
            return self.value((value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            return self.value((value.func, value.args, value.keywords))
        if isinstance(value, types.BuiltinFunctionType):
            return value
        if isinstance(value, types.FunctionType):
            held = (value.__defaults__, value.__kwdefaults__, [c.cell_contents for c in value.__closure__ or ()])
            return value.__code__, id(value.__globals__), self.value(held)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self.nested(value, self.tensor)
        if not hasattr(value, "__dict__") or not _holds_attributes_only(type(value)):
            raise _Unknown
        return type(value), self.value(vars(value))

    def nested(self, value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
        """Of a container its type and what it holds, tensors by ``of_tensor``."""
        if isinstance(value, Tensor):
            return of_tensor(value)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            self.count(len(value))
        if isinstance(value, Mapping):
            return type(value), tuple((self.value(k), self.nested(v, of_tensor)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(self.nested(v, of_tensor) for v in value)
        if isinstance(value, set | frozenset):
            return type(value), frozenset(self.value(v) for v in value)
        return self.value(value)


def _holds_attributes_only(kind: type) -> bool:
    """Whether all that an object holds is in its ``__dict__``: its classes are made by ``class``, without slots."""
    made_by_class = 1 << 9
    bases = [base for base in kind.__mro__ if base not in (object, types.SimpleNamespace)]
    return all(base.__flags__ & made_by_class and not vars(base).get("__slots__") for base in bases)


def _of_classes(kind: type) -> Any:
    """Plain attributes of a user's classes, which its modules read as theirs."""
    bases = (b for b in kind.__mro__ if b is not object and not b.__module__.startswith("torch."))
    found = (item for b in bases for item in vars(b).items())
    return tuple((name, v) for name, v in found if isinstance(v, bool | int | float | str) and name[:2] != "__")


def _of_input(t: Tensor, cut: bool) -> Any:
    if cut:
        return t.dtype, t.shape[1:]
    if t.is_nested or t.layout != torch.strided or t.numel() > VALUES:
        raise _Unknown
    return t.dtype, t.shape, tuple(t.detach().reshape(-1).tolist())
