"""Errors that the user can put right."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(Exception):
    """Shown by the commands as one line, without a traceback: say what is wrong, where, and what to do."""


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
