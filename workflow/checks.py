"""The config against its schema: every wrong value as one line that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from papers import registry

SCHEMA = Path(__file__).parent / "schemas" / "config.schema.yaml"
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


@cache
def schema() -> dict[str, Any]:
    """The whole schema: the workflow's own part, and each study's block from the study's folder."""
    total = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
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
    lines = violations(schema(), config)
    meant = {line.split("did you mean ")[1].split("?")[0] for line in lines if "did you mean " in line}
    lines = [line for line in lines if line.split(" is missing")[0] not in meant]
    covered = {line.split(" = ")[0] for line in lines}
    hints = [line for line in _numbers_as_text("", config) if line.split(" = ")[0] not in covered]
    return list(dict.fromkeys(lines + hints))


def violations(part: Mapping[str, Any], value: Any, key: str = "") -> list[str]:
    """One line for each thing in a value that a schema does not allow; ``key`` is where the value stands."""
    errors = sorted(
        Draft202012Validator(part).iter_errors(value), key=lambda error: list(map(str, error.absolute_path))
    )
    return [line for error in errors for line in _lines(error, key)]


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
            guess = difflib.get_close_matches(str(unknown), known, 1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            yield f"{_join(key, unknown)} is not a known key; {hint}allowed: {', '.join(known) or 'none'}"
    elif rule == "pattern" and key and part.get("title") == "key":
        yield f"{key} has {value!r}, which is not a name of the right form; allowed: {_allowed(part)}"
    elif rule == "required":
        missing = [name for name in part["required"] if name not in value]
        yield from (f"{_join(key, name)} is missing; {_wanted(part, name)}" for name in missing)
    else:
        yield f"{key} = {value!r} is not allowed; {_number_hint(value) or 'allowed: ' + _allowed(part)}"


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


def _number_hint(value: Any) -> str:
    """What to write for a number that YAML reads as text: ``1e-3`` has no dot, so it is none to YAML."""
    if not isinstance(value, str) or not any(c.isdigit() for c in value):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    return f"YAML reads it as text; write it as a number: {_yaml_number(number)}"


def _yaml_number(number: float) -> str:
    text = repr(number)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def _numbers_as_text(key: str, value: Any) -> Iterator[str]:
    """Numbers written as text, where the schema leaves the type open."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers_as_text(_join(key, name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers_as_text(f"{key}[{index}]", inner)
    elif hint := _number_hint(value):
        yield f"{key} = {value!r} is not allowed; {hint}"
