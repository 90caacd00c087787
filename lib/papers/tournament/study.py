"""The tournament of all optimisers (A-X2), their largest stable learning rates (A-X3), and the ablation (A-X4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from papers.common.study import Artefact, Measure, Study, StudyError

FIGURES = "papers.tournament.figures"
TABLES = "papers.tournament.tables"
MEASURES = "papers.tournament.measures"


def declare(config: Mapping[str, Any]) -> Study:
    """One job per network and optimiser races it over the whole grid; the figures and tables compare the races."""
    t = config["studies"]["tournament"]
    races = tuple(m for n in t["networks"] for m in _races(config, t, n, n.get("optimizers", t["optimizers"]), "race"))
    artefacts = _comparison(t, races)
    if "stability" in t:
        artefacts += _stability(config, t)
    if "ablation" in t:
        artefacts += _ablation(config, t)
    return Study(artefacts=artefacts)


def _block(config: Mapping[str, Any], section: str, name: str) -> dict[str, Any]:
    """A named block of the config, with its name in it."""
    if name not in config[section]:
        raise StudyError(f"studies.tournament names {name!r}, which {section} does not have")
    return {"name": name, **config[section][name]}


def _race_spec(config: Mapping[str, Any], network: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    return {
        "dataset": network["dataset"],
        "model": _block(config, "models", network["model"]),
        "optimizer": _block(config, "optimizers", optimizer),
        "task": network["task"],
        "batch_size": network["batch_size"],
    }


def _races(
    config: Mapping[str, Any], t: Mapping[str, Any], network: Mapping[str, Any], names: Sequence[str], folder: str
) -> list[Measure]:
    grid = {key: network.get(key, t[key]) for key in ("lrs", "tuning_seeds", "seeds")}
    place = f"tournament/{folder}/{network['dataset']}-{network['model']}"
    return [
        Measure(
            f"{place}/{name}",
            f"{MEASURES}:race",
            datasets=(network["dataset"],),
            spec={**_race_spec(config, network, name), **grid},
        )
        for name in names
    ]


def _comparison(t: Mapping[str, Any], races: tuple[Measure, ...]) -> list[Artefact]:
    rivals = {"reference": t["reference"], "against": t["against"]}
    one = {"reference": t["reference"]}
    return [
        Artefact(
            "A-X2",
            "table",
            f"{TABLES}:ranking",
            {"races": races},
            spec=one,
            paper="A",
            title="All optimisers at their best learning rates",
        ),
        Artefact(
            "A-X2-curves",
            "figure",
            f"{FIGURES}:curves",
            {"races": races},
            spec=one,
            paper="A",
            title="Loss of all optimisers at their best learning rates",
        ),
        Artefact(
            "A-X2-speedup",
            "figure",
            f"{FIGURES}:speed_up_bars",
            {"races": races},
            spec=rivals,
            paper="A",
            title="Speed-up to the target loss",
        ),
    ]


def _stability(config: Mapping[str, Any], t: Mapping[str, Any]) -> list[Artefact]:
    s = t["stability"]
    measures = tuple(
        Measure(
            f"tournament/stability/{n['dataset']}-{n['model']}/{name}",
            f"{MEASURES}:largest_stable_lr",
            datasets=(n["dataset"],),
            spec={
                **_race_spec(config, n, name),
                "task": {**n["task"], "epochs": s["epochs"], "evaluate_every": 0},
                **{key: s[key] for key in ("lrs", "seeds", "halvings")},
            },
        )
        for n in t["networks"]
        for name in n.get("optimizers", t["optimizers"])
    )
    return [
        Artefact(
            "A-X3",
            "figure",
            f"{FIGURES}:stability_ladder",
            {"stability": measures},
            spec={"reference": t["reference"]},
            paper="A",
            title="Largest stable learning rate",
        )
    ]


def _ablation(config: Mapping[str, Any], t: Mapping[str, Any]) -> list[Artefact]:
    a = t["ablation"]
    races = tuple(m for n in a["networks"] for m in _races(config, {**t, **a}, n, a["optimizers"], "ablation"))
    return [
        Artefact(
            "A-X4",
            "figure",
            f"{FIGURES}:ablation_bars",
            {"races": races},
            spec={"reference": t["reference"], "full": a["full"]},
            paper="A",
            title="What each part of the method is worth",
        )
    ]
