"""Paper C: CurveBall. What the study asks for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from papers.common.study import Artefact, Measure, Run, Study, published

MEASURES = "papers.c.measures"
TABLES = "papers.c.tables"
FIGURES = "papers.c.figures"
PUBLISHED = published(__file__)
NEEDS = {"curvspace.optim.kfac:KFAC": ("curvlinops", "pip install curvlinops-for-pytorch")}
"""Optimiser kinds that need a library beyond the project's own dependencies."""

Block = Mapping[str, Any]


def declare(config: Block) -> Study:
    """C-F1 … C-T4 at the scale of ``studies.c``."""
    c = config["studies"]["c"]
    networks = {name: runs for name, block in c["networks"].items() if (runs := _runs(config, name, block))}
    return Study(artefacts=[*_small(c), *_networks(c, networks), _costs(config, c), _damping(config, c)])


def _artefact(id: str, kind: str, function: str, inputs: Any, title: str, **rest: Any) -> Artefact:
    module = FIGURES if kind == "figure" else TABLES
    return Artefact(id, kind, f"{module}:{function}", inputs, paper="C", title=title, **rest)


def _small(c: Block) -> list[Artefact]:
    """The problems with known solutions: table 1 and figure 1."""
    block = c["small"]
    shared = {key: value for key, value in block.items() if key != "problems"}
    measures = {
        problem: Measure(f"c/small/{number}", f"{MEASURES}:small_problem", spec={"problem": problem, **shared})
        for number, problem in enumerate(block["problems"], start=1)
    }
    small = {"small": tuple(measures.values())}
    rosenbrock = {"small": tuple(m for problem, m in measures.items() if problem != "Rahimi-Recht")}
    return [
        _artefact("C-F1", "figure", "trajectories", rosenbrock, "Trajectories on the Rosenbrock function"),
        _artefact(
            "C-T1",
            "table",
            "iterations",
            small,
            "Iterations to the solution of small problems",
            spec={"published": PUBLISHED["iterations"]},
        ),
        _artefact("C-T1s", "table", "search", small, "Settings searched for C-T1"),
    ]


def _networks(c: Block, networks: Mapping[str, tuple[Run, ...]]) -> list[Artefact]:
    """Training error on images: figures 2 and 3, table 2, and the rates through training."""
    mnist = {name: runs for name, runs in networks.items() if name == c["mnist"]}
    images = {name: runs for name, runs in networks.items() if name not in mnist}
    timed = {name: runs for name, runs in networks.items() if name == c["timed"]}
    adapted = {
        name: kept for name, runs in networks.items() if (kept := tuple(r for r in runs if r.optimizer == "curveball"))
    }
    artefacts = [
        _artefact("C-F2", "figure", "training_error", images, "Training error of networks on images"),
        _artefact(
            "C-T2",
            "table",
            "errors",
            networks,
            "Best training and validation error",
            spec={"published": PUBLISHED["errors"]},
        ),
        _artefact("C-F3", "figure", "error_by_time", timed, "Training error against wall-clock time"),
        _artefact("C-X1", "figure", "rates", adapted, "CurveBall's ρ, β, λ and γ through training"),
    ]
    if mnist:
        artefacts.insert(1, _artefact("C-F2d", "figure", "training_error", mnist, "Training error of an MLP on MNIST"))
    return artefacts


def _runs(config: Block, network: str, block: Block) -> tuple[Run, ...]:
    """All optimisers, learning rates and seeds of one network; none, with a line, where its data are not configured."""
    if block["dataset"] not in config["datasets"]:
        _say(f"studies.c: {network} is skipped: no data set {block['dataset']!r} in the config's datasets")
        return ()
    return tuple(
        Run(block["dataset"], block["model"], optimizer, block["batch_size"], lr, seed)
        for optimizer, lrs in block["optimizers"].items()
        if lrs and _available(config, network, optimizer)
        for lr in lrs
        for seed in block["seeds"]
    )


def _available(config: Block, network: str, optimizer: str) -> bool:
    """Whether the library behind an optimiser is installed; says so where it is not."""
    module, install = NEEDS.get(config["optimizers"].get(optimizer, {}).get("kind", ""), ("", ""))
    if not module or importlib.util.find_spec(module):
        return True
    _say(f"studies.c: {optimizer} of {network} is skipped: {module} is not installed ({install})")
    return False


@cache
def _say(line: str) -> None:
    """One line on standard error, once."""
    print(line, file=sys.stderr)


def _costs(config: Block, c: Block) -> Artefact:
    block = c["costs"]
    spec = {
        **{key: block[key] for key in ("dataset", "batch_size", "rounds", "lr")},
        "model": {"name": block["model"], **config["models"][block["model"]]},
        "reference": block["optimizers"][0],
        "optimizers": {name: config["optimizers"][name] for name in block["optimizers"]},
    }
    measure = Measure("c/costs", f"{MEASURES}:step_costs", datasets=(block["dataset"],), spec=spec)
    return _artefact("C-T3", "table", "costs", {"costs": measure}, "Cost of a step")


def _damping(config: Block, c: Block) -> Artefact:
    block = c["first_damping"]
    runs = tuple(
        Run(block["dataset"], block["model"], optimizer, block["batch_size"], 1.0, seed)
        for optimizer in block["optimizers"]
        for seed in block["seeds"]
    )
    return _artefact("C-T4", "table", "damping_sensitivity", {"runs": runs}, "Errors against the first λ")
