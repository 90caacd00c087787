"""What the schema cannot say of the block studies.tournament."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from papers.common.checks import among, apart, once

Block = Mapping[str, Any]


def problems(block: Block) -> Iterator[str]:
    """One line for each wrong value."""
    key = "studies.tournament"
    yield from _networks(key, block["networks"], block)
    for number, network in enumerate(block["networks"]):
        names = network.get("optimizers", block["optimizers"])
        where = f"the optimizers of networks[{number}]"
        yield from among(f"{key}.reference", [block["reference"]], names, where)
        yield from among(f"{key}.against", block["against"], names, where)
    if "ablation" in block:
        ablation = block["ablation"]
        yield from _networks(f"{key}.ablation", ablation["networks"], {**block, **ablation})
        where = f"{key}.ablation.optimizers"
        yield from among(f"{key}.ablation.full", [ablation["full"]], ablation["optimizers"], where)
        yield from among(f"{key}.reference", [block["reference"]], ablation["optimizers"], where)


def _networks(key: str, networks: list[Block], common: Block) -> Iterator[str]:
    yield from once(f"{key}.networks", (f"{network['dataset']}/{network['model']}" for network in networks))
    for number, network in enumerate(networks):
        grid = {**common, **network}
        yield from apart(f"{key}.networks[{number}]", grid["tuning_seeds"], grid["seeds"])
