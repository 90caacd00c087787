"""What the schema cannot say of the block studies.race."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from papers.common.checks import among, apart, once

Block = Mapping[str, Any]


def problems(block: Block) -> Iterator[str]:
    """One line for each wrong value."""
    key = "studies.race"
    yield from once(f"{key}.workloads", (f"{load['dataset']}/{load['model']}" for load in block["workloads"]))
    for name, entry in block["optimizers"].items():
        for option, bounds in entry["search"].items():
            if not bounds[0] < bounds[1]:
                yield f"{key}.optimizers.{name}.search.{option} = {bounds} is not allowed; allowed: lower, upper"
    for number, workload in enumerate(block["workloads"]):
        grid = {**block, **workload}
        place = f"{key}.workloads[{number}]"
        yield from apart(place, grid["tuning_seeds"], grid["seeds"])
        horizons = grid["horizons"]
        if horizons != sorted(set(horizons)) or horizons[-1] != 1:
            yield f"{place}: horizons = {horizons} is not allowed; allowed: ascending, the last one 1"
    if "mean_directions" in block:
        names = (f"{run['dataset']}-{run['model']}" for run in block["mean_directions"]["runs"])
        yield from once(f"{key}.mean_directions.runs", names)
    if "annealing" in block:
        annealing = block["annealing"]
        where = f"{key}.annealing.optimizers"
        yield from among(f"{key}.annealing.reference", [annealing["reference"]], annealing["optimizers"], where)
        if "switching" in block:
            yield from among(
                f"{key}.switching.optimizers", block["switching"]["optimizers"], annealing["optimizers"], where
            )
