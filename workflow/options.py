"""The options that a kind of model or optimiser takes, as a schema, read from its signature.

Nothing is imported: names, defaults and annotations are taken from the source. So an option is described in one
place, the function which takes it, and a wrong one is refused before anything runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from workflow.checks import violations
from workflow.invalidation import Code, Module

NOT_OPTIONS = {"self", "model", "params", "lr", "loss", "num_classes", "input_shape"}
"""Parameters that the run, the model or the data set decides."""
FILLED_IN = {"k"}
"""Parameters that need not be given: the registry puts in the number of classes."""
SIMPLE = {"float": "number", "int": "integer", "bool": "boolean", "str": "string", "None": "null"}
LISTS = {"tuple", "list", "Sequence"}


def problems(code: Code, key: str, block: Mapping[str, Any], target: str) -> Iterator[str]:
    """One line for each option of a config block that ``target`` (``module:function``) does not take."""
    part = schema(code, target)
    if part is not None:
        options = {name: value for name, value in block.items() if name != "kind"}
        yield from violations(part, options, key)


def schema(code: Code, target: str) -> dict[str, Any] | None:
    """A JSON schema of the keyword options of a function, or of a class; None where the source is not ours."""
    name, _, function = target.partition(":")
    module = code.module(name)
    definition = _definition(module, function) if module else None
    if module is None or definition is None:
        return None
    arguments = definition.args
    named = [a for a in (*arguments.args, *arguments.kwonlyargs) if a.arg not in NOT_OPTIONS]
    first = len(arguments.args) - len(arguments.defaults)
    required = [a.arg for i, a in enumerate(arguments.args) if i < first]
    required += [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    return {
        "type": "object",
        "properties": {a.arg: _accepts(module, a.annotation) for a in named},
        "required": [name for name in required if name not in NOT_OPTIONS | FILLED_IN],
        "additionalProperties": arguments.kwarg is not None,
    }


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
            parts = [_accepts(module, left), _accepts(module, right)]
            return {"anyOf": [inner for part in parts for inner in part.get("anyOf", [part])]} if all(parts) else {}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            elements = values.elts if isinstance(values, ast.Tuple) else [values]
            return {"enum": [ast.literal_eval(element) for element in elements]}
        case ast.Subscript(value=ast.Name(id=name)) if name in LISTS:
            return {"type": "array"}
    return {}


def _alias(module: Module, name: str) -> ast.expr | None:
    """The right-hand side of ``Name = …`` in the module."""
    for statement in module.definitions.get(name, []):
        if isinstance(statement, ast.Assign):
            return statement.value
    return None
