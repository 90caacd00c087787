"""Progress of long work on standard error: a bar where a person watches, elsewhere (a log file) a line a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_S = 60.0
"""Seconds between two lines, and before the first: short work leaves none."""
KNOWN = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, about {remaining} left{postfix}"
OPEN = "{desc}: {n_fmt} {unit}s, {elapsed} so far{postfix}"


def bar(items: Iterable[Any] | None = None, *, show: bool = True, unit: str = "item", **options: Any) -> tqdm[Any]:
    """tqdm's bar over ``items`` or to be moved by hand; ``show=False``: none. ``options`` are tqdm's."""
    if not show:
        return tqdm(items, disable=True)
    if sys.stderr.isatty():
        return tqdm(items, unit=unit, **options)
    known = options.get("total") is not None or hasattr(items, "__len__")
    lines: Any = _Lines(sys.stderr)
    options |= {"delay": LINE_S, "mininterval": LINE_S, "maxinterval": LINE_S}
    return tqdm(items, unit=unit, file=lines, bar_format=KNOWN if known else OPEN, **options)


class _Lines:
    """Writes each state of a bar as a line of its own instead of over the last one."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
