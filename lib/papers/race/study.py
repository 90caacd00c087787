"""The race under schedules: every optimiser tuned alike, trained to the end of a decaying rate, at several horizons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Measure, Run, Study, StudyError

FIGURES = "papers.race.figures"
TABLES = "papers.race.tables"
MEASURES = "papers.race.measures"
WHY = "papers.race.measures_why"
WHY_FIGURES = "papers.race.figures_why"
DYNAMICS = "papers.race.measures_dynamics"
DYNAMICS_FIGURES = "papers.race.figures_dynamics"


def declare(config: Mapping[str, Any]) -> Study:
    """One job per workload and optimiser tunes it and runs the winner; figures and tables compare the runs."""
    r = config["studies"]["race"]
    races = tuple(_race(config, r, workload, name) for workload in r["workloads"] for name in _entrants(r, workload))
    families = [[name, block["family"]] for name, block in r["optimizers"].items()]  # a list: its order is the legend's
    rivals = {"families": families, "against": r["against"]}

    def artefact(id: str, kind: str, function: str, title: str, spec: Mapping[str, Any]) -> Artefact:
        place = FIGURES if kind == "figure" else TABLES
        return Artefact(id, kind, f"{place}:{function}", {"races": races}, spec=spec, paper="X", title=title)

    compared = [
        artefact("X-R1", "figure", "horizons", "Final loss by length of training", {"families": families}),
        artefact("X-R2", "figure", "speed_ups", "Speed-up against each rival", rivals),
        artefact("X-R3", "figure", "tuning", "What each optimiser was tried with", {"families": families}),
        artefact("X-R4", "table", "results", "Final loss, accuracy and cost of all optimisers", {}),
    ]
    return Study(artefacts=[*compared, *_explained(r), *_dynamics(r, config["optimizers"])])


def _explained(r: Mapping[str, Any]) -> list[Artefact]:
    """What decides between the explanations, from runs at constant rates."""
    found = []
    if "mean_directions" in r:
        block = r["mean_directions"]
        spec = {key: block[key] for key in ("examples", "k", "tol")}
        measures = tuple(
            Measure(f"race/means/{run.dataset}-{run.model}", f"{WHY}:mean_shares", (run,), spec=spec)
            for run in (Run(**one) for one in block["runs"])
        )
        title = "How much of the sharp directions lies in the units' mean directions"
        found.append(
            Artefact("X-R5", "figure", f"{WHY_FIGURES}:mean_shares", {"shares": measures}, paper="X", title=title)
        )
    if "annealing" in r:
        block = r["annealing"]
        measure = Measure("race/annealed", f"{WHY}:annealed", _constant(block), spec={"steps": block["steps"]})
        title = "What is left of the lead when the rate goes to zero"
        spec = {"reference": block["reference"]}
        function = f"{WHY_FIGURES}:annealed"
        found.append(Artefact("X-R6", "figure", function, {"branches": (measure,)}, spec=spec, paper="X", title=title))
    return found


def _dynamics(r: Mapping[str, Any], optimizers: Mapping[str, Any]) -> list[Artefact]:
    """What single steps do, and what a change of the optimiser does, from the runs that are annealed."""
    found = []
    if "windows" in r:
        measure = Measure("race/windows", f"{DYNAMICS}:windows", _constant(r["annealing"]), spec=r["windows"])
        title = "What steps do in a span and outside it"
        function = f"{DYNAMICS_FIGURES}:windows"
        found.append(Artefact("X-R7", "figure", function, {"windows": (measure,)}, paper="X", title=title))
    if "switching" in r:
        block = dict(r["switching"])
        names = block.pop("optimizers")
        spec = {**block, "optimizers": {name: optimizers[name] for name in names}}
        runs = tuple(run for run in _constant(r["annealing"]) if run.optimizer in names)
        measure = Measure("race/switched", f"{DYNAMICS}:switched", runs, spec=spec)
        title = "The largest eigenvalue after the filter is switched on or off"
        function = f"{DYNAMICS_FIGURES}:switched"
        found.append(Artefact("X-R8", "figure", function, {"switched": (measure,)}, paper="X", title=title))
    return found


def _constant(block: Mapping[str, Any]) -> tuple[Run, ...]:
    """The runs at constant rates that studies.race.annealing names."""
    return tuple(
        Run(block["dataset"], block["model"], name, block["batch"], lr, seed)
        for name, lr in block["optimizers"].items()
        for seed in block["seeds"]
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
            "task": workload["task"] | {key: v for key, v in r["optimizers"][name].items() if key == "schedule"},
            "batch_size": workload["batch_size"],
            "search": r["optimizers"][name]["search"],
            **grid,
        },
    )
