"""What the schema cannot say of the block studies.b."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from papers.b.study import CHANGES, NETWORKS
from papers.common.checks import among

Block = Mapping[str, Any]


def problems(block: Block) -> Iterator[str]:
    """One line for each wrong value."""
    key, count, dimensions = "studies.b", block["k"], block["dimensions"]
    fc = block["networks"]["fc"]["steps"]
    yield from among(f"{key}.gradient_steps", block["gradient_steps"], fc, f"{key}.networks.fc.steps")
    for name in NETWORKS:
        network = block["networks"][name]
        place = f"{key}.networks.{name}"
        yield from among(f"{place}.starts", network.get("starts", ()), network["steps"], f"{place}.steps")
    if max(dimensions) > count:
        yield f"{key}.dimensions has {max(dimensions)}, more than k; allowed: at most {count}"
    for name in CHANGES:
        if "k" not in block["cases"][name]:
            yield f"{key}.cases.{name}.k is missing; it is: the number of top eigenpairs measured for B-F12"
