"""What the schema cannot say of the block studies.c."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def problems(block: Mapping[str, Any]) -> Iterator[str]:
    """One line for each wrong value."""
    key, small = "studies.c", block["small"]
    if small["traced"] > small["runs"]:
        yield f"{key}.small.traced = {small['traced']} is not allowed; allowed: at most runs = {small['runs']}"
