"""What the schema cannot say of the block studies.c."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from papers.common.checks import among


def problems(block: Mapping[str, Any]) -> Iterator[str]:
    """One line for each wrong value."""
    key, small, costs = "studies.c", block["small"], block["costs"]
    if small["traced"] > small["runs"]:
        yield f"{key}.small.traced = {small['traced']} is not allowed; allowed: at most runs = {small['runs']}"
    named = [name for name in costs["lr"] if name != "default"]
    yield from among(f"{key}.costs.lr", named, costs["optimizers"], f"{key}.costs.optimizers")
