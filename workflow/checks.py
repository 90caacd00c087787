"""The config against its schema: every wrong value as one line that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from papers import registry
from papers.common import yaml_files

SCHEMA = Path(__file__).parent / "schemas" / "config.schema.yaml"
OPEN = ("datasets", "models", "optimizers", "studies")
"""Sections in which a function of the user's own may take options that no schema knows."""
TEXT = (".kind", ".source", ".folder", ".family")
"""Options there that are text, whatever stands in them."""
RENAMED = {
    **{"eigenpairs": ("k",), "eigenvalues": ("k",), "count": ("k",)},
    **{"state": ("batch_norm",), "method": ("batch_norm", "algorithm"), "lr_decay_per_epoch": ("schedule",)},
}
"""What keys of earlier configs are called now, where the block has the new one."""
LARGEST = 2**32 - 1
LARGEST_FLOAT = 3.4e38
"""Float32's range: what lies above is infinite in training."""
TYPES = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a block of keys",
    "null": "null",
}
BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "greater than {}",
    "exclusiveMaximum": "less than {}",
    "minItems": "with at least {} entries",
    "maxItems": "with at most {} entries",
    "minLength": "of at least {} characters",
    "pattern": "like {}",
}


def _whole(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_Validator: Any = extend(
    Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _whole)
)
"""JSON Schema takes 64.0 and 1.0e+30 for whole numbers; a seed, a size, a number of steps is none of these."""


@cache
def schema() -> dict[str, Any]:
    """The whole schema: the workflow's own part, and each study's block from the study's folder."""
    total = yaml_files.read(SCHEMA)
    for name, block in registry.schemas().items():
        definitions = block.pop("$defs", {})
        if twice := sorted(set(definitions) & set(total["$defs"])):
            raise ValueError(f"the schema of study {name} defines {twice[0]}, which another one has defined")
        total["$defs"] |= definitions
        own = {key: {"$ref": f"#/$defs/{key}"} for key in ("enabled", "scale")}
        properties = {**own, **block.get("properties", {})}
        total["properties"]["studies"]["properties"][name] = {"type": "object", **block, "properties": properties}
    return total


def problems(config: Mapping[str, Any]) -> list[str]:
    """One line for each wrong value of the config, in the order of its keys; empty when all is well."""
    lines = violations(schema(), config, config=config)
    meant = {line.split("did you mean ")[1].split("?")[0] for line in lines if "did you mean " in line}
    lines = [line for line in lines if line.split(" is missing")[0] not in meant]
    covered = {line.split(" = ")[0] for line in lines}
    further = [line for line in _further(config) if line.split(" = ")[0] not in covered]
    return list(dict.fromkeys(lines + further))


def problems_of(definition: str, value: Any, key: str) -> list[str]:
    """One line for each thing in a value that one of the schema's definitions does not allow."""
    definitions = schema()["$defs"]
    return violations({"$ref": f"#/$defs/{definition}", "$defs": definitions}, value, key)


def violations(
    part: Mapping[str, Any], value: Any, key: str = "", config: Mapping[str, Any] | None = None
) -> list[str]:
    """One line for each thing in a value that a schema does not allow; ``key`` is where the value stands.

    Besides JSON Schema's keywords there is ``refers: section``: a name that a section of the ``config`` must have.
    """
    validator = _with_references(config or {})(part)
    errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    return [line for error in errors for line in _lines(error, key)]


def _with_references(config: Mapping[str, Any]) -> Any:
    """A class of validators that know ``refers``."""

    def refers(_: Any, section: str, name: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(name, str) and (said := _no_such(config, section, name)):
            yield ValidationError(said)

    return extend(_Validator, {"refers": refers})


def _no_such(config: Mapping[str, Any], section: str, name: str) -> str:
    """What there is instead of a name that a section of the config does not have; empty if it has it."""
    known = _section(config, section)
    if name in known:
        return ""
    guess = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {guess[0]}? " if guess else ""
    return f"{section} has no {name!r}; {hint}there are: {', '.join(known) or 'none'}"


def _section(config: Mapping[str, Any], path: str) -> list[str]:
    """The names that stand in a section of the config, given by its key with dots."""
    found: Any = config
    for step in path.split("."):
        found = found.get(step, {}) if isinstance(found, Mapping) else {}
    return [name for name in found if isinstance(name, str)] if isinstance(found, Mapping) else []


def _lines(error: ValidationError, root: str) -> Iterator[str]:
    key, value, rule = _key(error, root), cast(Any, error.instance), error.validator
    part: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
    if rule in ("anyOf", "oneOf") and error.context:
        inner = [e for e in error.context if e.absolute_path != error.absolute_path]
        if inner:  # one alternative fits in kind: what is wrong inside it says more
            yield from (line for e in inner for line in _lines(e, root))
            return
    if rule == "additionalProperties":
        known = sorted(part.get("properties", {}))
        for unknown in sorted(set(value) - set(known)):
            renamed = [new for new in RENAMED.get(str(unknown), ()) if new in known]
            guess = renamed or difflib.get_close_matches(str(unknown), known, 1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            yield f"{_join(key, unknown)} is not a known key; {hint}allowed: {', '.join(known) or 'none'}"
    elif rule == "pattern" and key and part.get("title") == "key":
        yield f"{key} has {value!r}, which is not a name of the right form; allowed: {_allowed(part)}"
    elif rule == "refers":
        yield f"{key}: {error.message}"
    elif rule == "required":
        missing = [name for name in part["required"] if name not in value]
        yield from (f"{_join(key, name)} is missing; {_wanted(part, name)}" for name in missing)
    else:
        yield f"{key} = {value!r} is not allowed; {_number_hint(value, part) or 'allowed: ' + _allowed(part)}"


def _wanted(block: Mapping[str, Any], name: str) -> str:
    part = block.get("properties", {}).get(name, {})
    return f"it is: {part['description']}" if "description" in part else f"allowed: {_allowed(part)}"


def _allowed(part: Mapping[str, Any]) -> str:
    """What a part of the schema accepts, in words."""
    while "$ref" in part:
        part = {**schema()["$defs"][part["$ref"].rpartition("/")[2]], **{k: v for k, v in part.items() if k != "$ref"}}
    alternatives = part.get("anyOf") or part.get("oneOf")
    if "const" in part or "enum" in part:
        words = ", ".join("null" if v is None else str(v) for v in part.get("enum", [part.get("const")]))
    elif alternatives:
        words = " or ".join(map(_allowed, alternatives))
    else:
        kinds = part.get("type", [])
        kinds = " or ".join(TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)) or "another value"
        told = {"pattern"} if "description" in part else set()
        bounds = " and ".join(text.format(part[key]) for key, text in BOUNDS.items() if key in part and key not in told)
        words = f"{kinds} {bounds}".strip()
        if "items" in part:
            words += f" of: {_allowed(part['items'])}"
    return f"{words} ({part['description'].rstrip('.')})" if "description" in part else words


def _key(error: ValidationError, key: str) -> str:
    for part in error.absolute_path:
        key = f"{key}[{part}]" if isinstance(part, int) else _join(key, part)
    return key


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _number_hint(value: Any, part: Mapping[str, Any]) -> str:
    """What to write for a number that YAML reads as text (``1e-3`` has no dot), if the schema then allows it."""
    if not isinstance(value, str) or not any(c.isdigit() for c in value):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    whole = [int(number)] if number.is_integer() and abs(number) <= LARGEST else []
    fitting = [n for n in (*whole, number) if math.isfinite(n) and _fits(part, n)]
    if not fitting:
        return ""
    shown = str(fitting[0]) if value.strip().lstrip("+-").isdigit() or not _fits(part, number) else _yaml_number(number)
    return f"YAML reads it as text; write it as a number: {shown}"


def _fits(part: Mapping[str, Any], number: float) -> bool:
    """Whether a schema, with the definitions of the whole one, allows a number."""
    return _Validator({**part, "$defs": schema()["$defs"]}).is_valid(number)


def _yaml_number(number: float) -> str:
    text = repr(number)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def _further(config: Mapping[str, Any]) -> Iterator[str]:
    """What no schema says: numbers that no computer holds, numbers as text, entries that stand twice."""
    names = {name for section in OPEN[:3] for name in _section(config, section)}
    asked = {value for _, value in _values("studies", config.get("studies")) if isinstance(value, str)}
    for task in _section(config, "tasks"):
        for section, name in zip(("datasets", "models"), task.split("/"), strict=False):
            said = "" if name in asked else _no_such(config, section, name)  # paper C leaves out data that is not there
            if said:
                yield f"tasks.{task}: {said}"
    for key, value in _values("", config):
        top, _, rest = key.partition(".")
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            yield f"{key} = {value} is not allowed; allowed: a finite number of at most {LARGEST_FLOAT:.3g}"
        elif isinstance(value, int) and abs(value) > LARGEST:
            yield f"{key} = {value} is not allowed; allowed: whole numbers up to {LARGEST}"
        elif isinstance(value, str) and top in OPEN and rest and not rest.endswith(TEXT) and value not in names:
            if hint := _number_hint(value, {}):
                yield f"{key} = {value!r} is not allowed; {hint}"
        elif top == "studies" and isinstance(value, list):
            twice = next((entry for i, entry in enumerate(value) if entry in value[:i]), None)
            if twice is not None:
                yield f"{key} = {value!r} is not allowed; allowed: each entry once, but {twice!r} stands there twice"


def _values(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of nested blocks and lists, with its key."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(_join(key, name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _values(f"{key}[{index}]", inner)
