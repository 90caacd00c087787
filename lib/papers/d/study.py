"""Paper D: negative eigenvalues of the Hessian. What the study asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from papers.common.study import Artefact, Measure, Run, Study

MEASURES = "papers.d.measures"
TABLES = "papers.d.tables"
FIGURES = "papers.d.figures"


def declare(config: Mapping[str, Any]) -> Study:
    """D-F1 … D-X2 at the scale of ``studies.d``."""
    d = config["studies"]["d"]
    spectra = tuple(_spectrum(d, block) for block in d["runs"])
    return Study(artefacts=[*_along_training(d, spectra), *_along_directions(d), *_costs(d), *_optimizer(d)])


def _run(block: Mapping[str, Any]) -> Run:
    names = ("dataset", "model", "optimizer", "batch_size", "lr", "seed")
    return Run(*(block[name] for name in names))


def _spectrum(d: Mapping[str, Any], block: Mapping[str, Any]) -> Measure:
    run = _run(block)
    spec = {**d["spectrum"], "fraction": d["fraction"], "tol": d["tol"]}
    return Measure(f"d/spectrum/{run.dataset}-{run.model}", f"{MEASURES}:spectrum", (run,), spec=spec)


def _measure(d: Mapping[str, Any], key: str, function: str, **fixed: Any) -> Measure:
    """A measure on the first run, the one studied in depth, with the options of the block ``key``."""
    return Measure(f"d/{key}", f"{MEASURES}:{function}", (_run(d["runs"][0]),), spec={**d[key], **fixed})


def _labels(d: Mapping[str, Any]) -> dict[str, str]:
    return {"data": d["runs"][0]["dataset"], "model": d["runs"][0]["model"]}


def _along_training(d: Mapping[str, Any], spectra: tuple[Measure, ...]) -> list[Artefact]:
    common = {"fraction": d["fraction"], "tol": d["tol"]}
    directions = _measure(d, "fixed_directions", "fixed_directions", **common)
    profiles = _measure(d, "profiles", "profiles", **common)
    figures: list[tuple[str, str, dict[str, Any], str]] = [
        ("D-F1", "spectrum", {"spectrum": spectra}, "Both ends of the spectrum along training"),
        (
            "D-F2",
            "fixed_directions",
            {"directions": directions, "spectrum": spectra[0]},
            "Curvature along a fixed direction through training",
        ),
        ("D-F3", "profiles", {"profiles": profiles}, "The loss along both extreme directions, and its quadratic model"),
    ]
    return [
        Artefact(id, "figure", f"{FIGURES}:{name}", inputs, paper="D", title=title, labels=_labels(d))
        for id, name, inputs, title in figures
    ]


def _along_directions(d: Mapping[str, Any]) -> list[Artefact]:
    options = {key: value for key, value in d["directions"].items() if key != "steps"}
    spec = {**options, "fraction": d["fraction"], "tol": d["tol"]}
    measures = tuple(  # one job a checkpoint: no scan needs another's
        Measure(
            f"d/directions/step-{step}", f"{MEASURES}:directions", (_run(d["runs"][0]),), spec={**spec, "step": step}
        )
        for step in d["directions"]["steps"]
    )
    radii = options["radii"]
    figures = [
        ("D-F4", "large_scale_curvature", {"radii": radii}, "Curvature over a larger range against the eigenvalue"),
        ("D-F5", "inverse_step", {}, "Best step against the eigenvalue"),
        ("D-F6", "improvement", {}, "Best improvement along each eigenvector"),
        ("D-X2", "kinds_of_direction", {"radius": radii[0]}, "Scans along class gradients and random directions"),
    ]
    inputs = {"directions": measures}
    return [
        *(
            Artefact(id, "figure", f"{FIGURES}:{name}", inputs, spec, "D", title, _labels(d))
            for id, name, spec, title in figures
        ),
        Artefact("D-T1", "table", f"{TABLES}:line_searches", inputs, {}, "D", "Line searches in numbers", _labels(d)),
    ]


def _costs(d: Mapping[str, Any]) -> list[Artefact]:
    tables = [
        (
            "D-C1",
            "solver_costs",
            "costs",
            _measure(d, "costs", "solver_costs", fraction=d["fraction"]),
            "Cost of LA(20) and SA(3)",
        ),
        (
            "D-C2",
            "subset_agreement",
            "agreement",
            _measure(d, "agreement", "subset_agreement", fraction=d["fraction"]),
            "Eigenpairs on 5 % of the training data and on all of it",
        ),
        (
            "D-C3",
            "scan_speed",
            "speed",
            _measure(d, "scan_speed", "scan_speed", fraction=d["fraction"]),
            "Loss evaluations per second",
        ),
    ]
    return [
        Artefact(id, "table", f"{TABLES}:{name}", {label: (measure,)}, {}, "D", title, _labels(d))
        for id, name, label, measure, title in tables
    ]


def _optimizer(d: Mapping[str, Any]) -> list[Artefact]:
    block = d["optimizer"]
    runs = {
        name: tuple(
            Run(block["dataset"], block["model"], name, block["batch_size"], lr, seed)
            for lr in lrs
            for seed in block["seeds"]
        )
        for name, lrs in (block["base"], *block["others"])
    }
    every = tuple(run for part in runs.values() for run in part)
    spec = {"bottom": block["bottom"], "fraction": d["fraction"], "tol": d["tol"]}
    estimate = Measure("d/running-estimate", f"{MEASURES}:running_estimate", runs[block["estimate"]], spec=spec)
    base = {"base": block["base"][0]}
    labels = {"data": block["dataset"], "model": block["model"]}
    figure = Artefact(
        "D-X1",
        "figure",
        f"{FIGURES}:optimizer",
        {"runs": every, "estimate": (estimate,)},
        base,
        "D",
        "The optimiser that the authors proposed, at equal cost",
        labels,
    )
    table = Artefact("D-T2", "table", f"{TABLES}:equal_cost", {"runs": every}, base, "D", "Loss at equal cost", labels)
    return [figure, table]
