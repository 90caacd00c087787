"""What a loss keeps from one call to the next: statistics, centres, counters, logs.

It lies in the modules that the loss is or calls, in the attributes of objects, and in the variables around a function.
What is global, or inside of other libraries' objects, is not seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from curvspace.module_state import LISTS, LONGEST, Copies, left_alone, working_copy

DEPTH = 3
"""How far from the loss it is looked for: function, object, attribute."""

AT_MOST = 20_000
"""Things that are looked at, at most."""

_MADE_BY_CLASS = 1 << 9
_SHARED = {"_thread", "threading", "queue", "_queue", "multiprocessing", "concurrent", "asyncio", "socket", "_io"}
_ANY_BASE = {"abc", "typing", "dataclasses"}


@contextmanager
def undisturbed(loss: Any, apart_from: Collection[nn.Module] = ()) -> Iterator[None]:
    """Whatever calls inside move of what a loss keeps, they leave as it was; not in the modules ``apart_from``."""
    found = _Found()
    found.look(loss, 0)
    copies, name = Copies(), "what the loss keeps"
    attributes = [(store, dict(store)) for store in found.attributes]
    contents = [(cell, cell.cell_contents) for cell in found.cells]
    with ExitStack() as stack:
        stack.enter_context(left_alone(m for m in found.modules if m not in apart_from))
        try:
            for store, before in attributes:
                store.update({key: working_copy(value, copies, name) for key, value in before.items()})
            for cell, content in contents:
                cell.cell_contents = working_copy(content, copies, name)
            yield
        finally:
            for store, before in attributes:
                for key in store.keys() - before.keys():
                    del store[key]
                store.update(before)
            for cell, content in contents:
                cell.cell_contents = content
            copies.warn_of_changes()


def require_no_reference(loss: Any, model: nn.Module, what: str) -> None:
    """Raise ``TypeError`` where a function reads the model, or a tensor of its, by a variable around it: a copy of the
    ``what`` that has a copy of the model would still read the original."""
    found = _Found()
    found.look(loss, 0)
    own = {id(held) for held in (*model.modules(), *model.parameters(), *model.buffers())}
    if any(id(held) in own for held in found.referred):
        raise TypeError(
            f"this {what} cannot be copied: its loss reads the model by a variable, and would go on reading the "
            "original; make a new one on a copy of the model, or write the loss as a class that holds the model"
        )


class _Found:
    """The modules, objects and variables in which a loss may keep something, each once.

    ``referred``: modules and tensors by the variables around functions, which are not copied with these.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.referred: list[nn.Module | Tensor] = []
        self.attributes: list[dict[str, Any]] = []
        self._cells: dict[int, CellType] = {}
        self._seen: dict[int, Any] = {}

    def look(self, held: Any, depth: int, around: bool = False) -> None:
        kind = type(held)
        if around and issubclass(kind, nn.Module | Tensor):
            self.referred.append(held)
        if id(held) in self._seen or depth > DEPTH or len(self._seen) > AT_MOST:
            return
        self._seen[id(held)] = held
        inside: Iterable[Any] = ()
        if issubclass(kind, nn.Module):
            self.modules.append(held)
            inside = [value for m in held.modules() for value in vars(m).values()]
        elif kind is MethodType:
            inside = held.__self__, held.__func__
        elif kind is functools.partial:
            inside = held.func, *held.args, *held.keywords.values()
        elif kind is FunctionType:
            cells = [cell for cell in held.__closure__ or () if is_bound(cell)]
            self._cells.update({id(cell): cell for cell in cells})
            inside = *(c.cell_contents for c in cells), *(held.__globals__.get(n) for n in held.__code__.co_names)
        elif kind in LISTS and len(held) <= LONGEST:
            inside = list(held.values() if issubclass(kind, dict) else held)
        elif (attributes := _attributes(held)) is not None:
            self.attributes.append(attributes)
            inside = *attributes.values(), getattr(kind, "__call__", None)  # noqa: B004  the function
        for value in inside:
            self.look(value, depth + 1, around or kind is FunctionType)

    @property
    def cells(self) -> list[CellType]:
        return list(self._cells.values())


def is_bound(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises where the variable has no value yet
    except ValueError:
        return False
    return True


def _attributes(held: Any) -> dict[str, Any] | None:
    """Those of an object of a user's class on which nothing else may be at work: what is torch's and of the standard
    library (threads, files) is not touched, nor what holds a lock, a thread, a queue."""
    kind = type(held)
    if kind is SimpleNamespace:
        return vars(held)
    if issubclass(kind, type | Tensor) or not kind.__flags__ & _MADE_BY_CLASS:
        return None
    foreign = sys.stdlib_module_names - _ANY_BASE | {"torch", "numpy"}
    if any(base.__module__.partition(".")[0] in foreign for base in kind.__mro__ if base is not object):
        return None
    try:
        found = object.__getattribute__(held, "__dict__")
    except Exception:  # it has slots, or a property of that name
        return None
    shared = any(type(value).__module__.partition(".")[0] in _SHARED for value in list(found.values()))
    return None if shared else found
