"""What the schema cannot say of the block studies.d."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from papers.common.checks import among, once


def problems(block: Mapping[str, Any]) -> Iterator[str]:
    """One line for each wrong value."""
    key, optimizer = "studies.d", block["optimizer"]
    names = [name for name, _ in (optimizer["base"], *optimizer["others"])]
    yield from once(f"{key}.optimizer: base and others together", names)
    yield from among(f"{key}.optimizer.estimate", [optimizer["estimate"]], names, f"{key}.optimizer (base and others)")
    yield from once(f"{key}.runs", (f"{run['dataset']}-{run['model']}" for run in block["runs"]))
