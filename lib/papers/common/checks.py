"""What the studies' own checks of their block of the config are made of. A check gives one line for a wrong value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any


def among(key: str, values: Iterable[Any], allowed: Collection[Any], where: str) -> Iterator[str]:
    """One line for each value that is not among those allowed; ``where`` says where these stand."""
    known = ", ".join(map(str, allowed)) or "none"
    yield from (
        f"{key} has {value!r}, which {where} does not; allowed: {known}" for value in values if value not in allowed
    )


def apart(key: str, tuning: Iterable[int], final: Iterable[int]) -> Iterator[str]:
    """One line if a seed is used both to choose a setting and to report it."""
    shared = sorted(set(tuning) & set(final))
    if shared:
        yield f"{key}: seed {shared[0]} is both a tuning seed and a final seed; give seeds others than tuning_seeds"


def once(key: str, names: Iterable[str]) -> Iterator[str]:
    """One line for each name that stands there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{key} has {name} twice; leave one out"
        seen.add(name)
