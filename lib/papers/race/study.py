"""The race under schedules: every optimiser tuned alike, trained to the end of a decaying rate, at several horizons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Measure, Study, StudyError

FIGURES = "papers.race.figures"
TABLES = "papers.race.tables"
MEASURES = "papers.race.measures"


def declare(config: Mapping[str, Any]) -> Study:
    """One job per workload and optimiser tunes it and runs the winner; figures and tables compare the runs."""
    r = config["studies"]["race"]
    races = tuple(_race(config, r, workload, name) for workload in r["workloads"] for name in _entrants(r, workload))
    families = [[name, block["family"]] for name, block in r["optimizers"].items()]  # a list: its order is the legend's
    rivals = {"families": families, "against": r["against"]}

    def artefact(id: str, kind: str, function: str, title: str, spec: Mapping[str, Any]) -> Artefact:
        place = FIGURES if kind == "figure" else TABLES
        return Artefact(id, kind, f"{place}:{function}", {"races": races}, spec=spec, paper="X", title=title)

    return Study(
        artefacts=[
            artefact("X-R1", "figure", "horizons", "Final loss by length of training", {"families": families}),
            artefact("X-R2", "figure", "speed_ups", "Speed-up against each rival", rivals),
            artefact("X-R3", "figure", "tuning", "What each optimiser was tried with", {"families": families}),
            artefact("X-R4", "table", "results", "Final loss, accuracy and cost of all optimisers", {}),
        ]
    )


def _entrants(r: Mapping[str, Any], workload: Mapping[str, Any]) -> list[str]:
    names = workload.get("optimizers", list(r["optimizers"]))
    if absent := [name for name in [*names, *r["against"]] if name not in r["optimizers"]]:
        raise StudyError(f"studies.race names {absent[0]!r}, which studies.race.optimizers does not have")
    return names


def _race(config: Mapping[str, Any], r: Mapping[str, Any], workload: Mapping[str, Any], name: str) -> Measure:
    dataset, model = workload["dataset"], workload["model"]
    for section, wanted in (("datasets", dataset), ("models", model), ("optimizers", name)):
        if wanted not in config[section]:
            raise StudyError(f"studies.race names {wanted!r}, which {section} does not have")
    grid = {key: workload.get(key, r[key]) for key in ("trials", "tuning_seeds", "tuning_horizon", "seeds", "horizons")}
    if shared := set(grid["tuning_seeds"]) & set(grid["seeds"]):
        raise StudyError(f"studies.race: seed {min(shared)} is both a tuning seed and a final seed")
    return Measure(
        f"race/{dataset}-{model}/{name}",
        f"{MEASURES}:race",
        datasets=(dataset,),
        spec={
            "dataset": dataset,
            "model": {"name": model, **config["models"][model]},
            "optimizer": {"name": name, **config["optimizers"][name]},
            "task": workload["task"],
            "batch_size": workload["batch_size"],
            "search": r["optimizers"][name]["search"],
            **grid,
        },
    )
