"""Errors that the user can put right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Shown by the commands as one line, without a traceback: say what is wrong, where, and what to do."""


class WrongValue(UserError, ValueError):
    """A value of the user's that something refuses; its cause is the refusal."""


@contextmanager
def values_refused() -> Iterator[None]:
    """What is refused inside is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise WrongValue(str(error)) from error


WORDS = {"true", "false", "yes", "no", "on", "off", "none", "null"}
"""What a text may say in place of a value."""


def refuse_text(owner: str, function: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raise the ``ValueError`` for ``"false"`` or ``"0.9"`` where the function takes a flag or a number.

    It does by its annotation, or else by its default; the text would be taken for true, or for nothing at all.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _kind(parameter)
        value = options.get(name)
        if kind and isinstance(value, str) and (value.lower() in WORDS or _is_number(value)):
            wanted = "True or False" if kind == "bool" else "a number"
            raise ValueError(f"{owner}: {name} must be {wanted}, got {value!r}")


def _kind(parameter: inspect.Parameter) -> str | None:
    """ "bool", "int" or "float" where a parameter takes that and no text (``float | None``), else None."""
    found = parameter.annotation
    if found is parameter.empty:
        found = type(parameter.default)
    text = found if isinstance(found, str) else found.__name__ if isinstance(found, type) else str(found)
    words = re.split(r"\s*[|,]\s*", re.sub(r"^(?:typing\.)?(?:Optional|Union)\[(.*)\]$", r"\1", text))
    if not set(words) <= {"bool", "int", "float", "None", "NoneType"}:
        return None
    return next((word for word in words if word[0] != "N"), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def refuse_old(renamed: Mapping[str, str], **given: object) -> None:
    """Raise the ``ValueError`` that says what an old option, or an old value of one (``option=value``), is now."""
    for name, value in given.items():
        new = renamed.get(f"{name}={value}", renamed.get(name))
        if new is not None:
            raise ValueError(f"{name}={value!r} is now {new}")


def refuse_options(owner: str, renamed: Mapping[str, str], given: Mapping[str, object]) -> None:
    """Raise for any option in ``given``: a ``ValueError`` with its new name, a ``TypeError`` if it never was one."""
    refuse_old(renamed, **given)
    for name in given:
        raise TypeError(f"{owner} has no option {name!r}")
