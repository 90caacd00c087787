"""The options that a kind of model, optimiser or data set takes, as a schema, read from its signature.

Nothing is imported: names, defaults and annotations are taken from the source. So an option is described in one
place, the function which takes it, and a wrong one is refused before anything runs.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workflow.checks import violations
from workflow.invalidation import Code
from workflow.source import Module

NOT_OPTIONS = {"self", "model", "params", "lr", "loss", "num_classes", "input_shape"}
"""Parameters that the run, the model or the data set decides."""
NOT_IN_CONFIG = {"Tensor"}
"""Types that no config holds: alternatives to one that it does."""
HOPS = 4
"""Through so many modules a name is followed to where it is defined."""
FILLED_IN = {"k"}
"""Parameters that need not be given: the registry puts in the number of classes."""
SIMPLE = {"float": "number", "int": "integer", "bool": "boolean", "str": "string", "None": "null"}
LISTS = {"tuple", "list", "Sequence"}


def problems(code: Code, key: str, block: Mapping[str, Any], target: str) -> Iterator[str]:
    """One line for each option of a config block that ``target`` (``module:function``) does not take."""
    module, name = _found(code, *target.split(":", 1))
    if isinstance(module, str):
        yield f"{key} names {target!r}, but {module}"
        return
    part = _schema(module, name)
    if part is not None:
        options = {name: value for name, value in block.items() if name != "kind"}
        yield from violations(part, options, key)


def schema(code: Code, target: str) -> dict[str, Any] | None:
    """A JSON schema of the keyword options of a function, or of a class; None where the source is not to be read."""
    module, name = _found(code, *target.split(":", 1))
    return None if isinstance(module, str) else _schema(module, name)


def _found(code: Code, module_name: str, name: str) -> tuple[Module | str | None, str]:
    """The module that defines a name, and the name there; None if it cannot be told, text if there is none."""
    module = code.module(module_name)
    if module is not None:
        return module, name  # ours: what its imports lead to is the business of the code's hash
    for _ in range(HOPS):
        found = _elsewhere(module_name)
        if not isinstance(found, Module):
            return found, name
        module = found
        statements = module.definitions.get(name, [])
        imported = next((s for s in statements if isinstance(s, ast.ImportFrom) and s.module and not s.level), None)
        if imported is None:
            unseen = [s for s in module.definitions[""] if isinstance(s, ast.ImportFrom | ast.If | ast.Try | ast.For)]
            open_ended = unseen or "__getattr__" in module.definitions
            return module if statements else None if open_ended else f"{module_name} has no {name}", name
        alias = next(a for a in imported.names if (a.asname or a.name) == name)
        module_name, name = str(imported.module), alias.name
    return None, name


@cache
def _elsewhere(name: str) -> Module | str | None:
    """An installed module's source, or the user's; nothing is imported."""
    top, *rest = name.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top, [*sys.path, os.getcwd()])
    if spec is None:  # without torch here, jobs run in an environment of their own, which may have it
        here = importlib.machinery.PathFinder.find_spec("torch") is not None
        return f"there is no module {top} on Python's path" if here and top not in sys.builtin_module_names else None
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    if not rest:
        return Module(name, Path(spec.origin))
    stem = Path(spec.origin).parent.joinpath(*rest)
    if not spec.submodule_search_locations or not list(stem.parent.glob(f"{stem.name}*")):
        return f"there is no module {name}"
    file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
    return Module(name, file) if file else None


def _schema(module: Module | None, name: str) -> dict[str, Any] | None:
    definition = _definition(module, name) if module else None
    if module is None or definition is None:
        return None
    arguments = definition.args
    named = [a for a in (*arguments.args, *arguments.kwonlyargs) if a.arg not in NOT_OPTIONS]
    first = len(arguments.args) - len(arguments.defaults)
    required = [a.arg for i, a in enumerate(arguments.args) if i < first]
    required += [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    properties = {a.arg: _accepts(module, a.annotation) for a in named}
    handed = [_schema(module, target) for target in _handed_on(definition)]
    known = [part for part in handed if part]
    for part in known:
        optional = {name: values for name, values in part["properties"].items() if name not in part["required"]}
        properties = {**optional, **properties}
    closed = bool(handed) and len(known) == len(handed) and not any(part["additionalProperties"] for part in known)
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in required if name not in NOT_OPTIONS | FILLED_IN],
        "additionalProperties": arguments.kwarg is not None and not closed,
    }


def _handed_on(definition: ast.FunctionDef) -> list[str]:
    """Whom a function hands its further options, ``f(..., **options)``: names; "" for what is no plain name."""
    further = definition.args.kwarg
    if further is None:
        return []
    calls = [node for node in ast.walk(definition) if isinstance(node, ast.Call)]
    given = [c for c in calls if any(k.arg is None and ast.unparse(k.value) == further.arg for k in c.keywords)]
    return [c.func.id if isinstance(c.func, ast.Name) else "" for c in given]


def _definition(module: Module, name: str) -> ast.FunctionDef | None:
    for statement in module.definitions.get(name, []):
        if isinstance(statement, ast.FunctionDef):
            return statement
        if isinstance(statement, ast.ClassDef):
            return next((s for s in statement.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    return None


def _accepts(module: Module, annotation: ast.expr | None) -> dict[str, Any]:
    """The values that an annotation allows; everything where it is not a plain one."""
    match annotation:
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Name(id=name) if name in SIMPLE:
            return {"type": SIMPLE[name]}
        case ast.Name(id=name):
            return _accepts(module, _alias(module, name))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = [side for side in (left, right) if not (isinstance(side, ast.Name) and side.id in NOT_IN_CONFIG)]
            parts = [_accepts(module, side) for side in sides]
            return {"anyOf": [inner for part in parts for inner in part.get("anyOf", [part])]} if all(parts) else {}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            elements = values.elts if isinstance(values, ast.Tuple) else [values]
            return {"enum": [ast.literal_eval(element) for element in elements]}
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in LISTS:
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return {"type": "array", "items": _accepts(module, first)}
        case ast.Subscript(value=ast.Name(id="Mapping")):
            return {"type": "object"}
    return {}


def _alias(module: Module, name: str) -> ast.expr | None:
    """The right-hand side of ``Name = …`` in the module."""
    for statement in module.definitions.get(name, []):
        if isinstance(statement, ast.Assign):
            return statement.value
    return None
