r"""The race: the same number of quasi-random trials for every optimiser, then fresh seeds at several horizons.

A trial draws the learning rate and what else ``search`` names, log-uniformly between two bounds; the points in the unit
cube are the same for all optimisers. The trial with the lowest final loss, averaged over the tuning seeds, is run on
the final seeds once for each horizon h: a whole run of h times the task's epochs, its schedule brought to its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from scipy.stats import qmc
from torch import nn

from curvspace.datasets import DataSet
from curvspace.inputs import call
from curvspace.optim import registry
from curvspace.seeds import derived_seed
from curvspace.training.loop import fit
from curvspace.training.record import initial_model
from curvspace.training.spec import Block, Task
from papers.common.context import Context

NEVER = 10**9
"""Steps between evaluations: only the start and the end of a run are looked at."""
ENDS = {
    "val_loss": "val_loss",
    "val_accuracy": "val_accuracy",
    "train_loss": "eval_train_loss",
    "average_val_loss": "average_val_loss",
    "average_val_accuracy": "average_val_accuracy",
    "gradient_evaluations": "gradient_evaluations",
}
"""Column of the race -> column of a run's last row."""


def race(
    context: Context,
    dataset: str,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    task: Mapping[str, Any],
    batch_size: int,
    search: Mapping[str, Sequence[float]],
    trials: int,
    tuning_seeds: Sequence[int],
    tuning_horizon: float,
    seeds: Sequence[int],
    horizons: Sequence[float],
) -> pd.DataFrame:
    """One optimiser on one workload: one row per run, ``phase`` tuning or final. Runs done are kept if it is stopped.

    ``search`` has the bounds of each hyper-parameter: ``lr``, or an option of the optimiser's block (``weight_decay``,
    ``betas.0``, ``base.momentum``); with ``1-`` in front the difference to one is drawn.
    """
    points = quasi_random(search, trials)

    def run(trial: int, seed: int, horizon: float, phase: str) -> pd.DataFrame:
        values = points[trial]
        key = {
            **{"dataset": context.settings.get(dataset), "model": dict(model), "optimizer": dict(optimizer)},
            **{"task": dict(task), "batch_size": batch_size, "values": values, "seed": seed, "horizon": horizon},
        }
        length = {**task, "epochs": horizon * task["epochs"], "evaluate_every": NEVER}
        row = context.remembered(
            key, lambda: pd.DataFrame([_train(context, dataset, model, optimizer, length, batch_size, values, seed)])
        )
        return row.assign(phase=phase, trial=trial, seed=seed, horizon=horizon, dataset=dataset)

    rows, score = [], {}
    for trial in context.progress(range(trials), f"tuning {optimizer['name']} on {dataset}/{model['name']}"):
        tried = [run(trial, seed, tuning_horizon, "tuning") for seed in tuning_seeds]
        rows += tried
        score[trial] = sum(closing(part) for part in tried) / len(tried)
    best = min(score, key=lambda trial: score[trial])
    if math.isfinite(score[best]):
        pairs = [(seed, horizon) for seed in seeds for horizon in horizons]
        for seed, horizon in context.progress(pairs, f"{optimizer['name']} on {dataset}/{model['name']}"):
            rows.append(run(best, seed, horizon, "final"))
    table = pd.concat(rows, ignore_index=True)
    bounds = {name: list(limits) for name, limits in search.items()}
    return table.assign(model=model["name"], optimizer=optimizer["name"], batch_size=batch_size, bounds=str(bounds))


def closing(run: pd.DataFrame) -> float:
    """Final validation loss; infinite for a run that diverged."""
    loss = float(run["val_loss"].iloc[0])
    return loss if run["status"].iloc[0] == "finished" and math.isfinite(loss) else math.inf


def quasi_random(search: Mapping[str, Sequence[float]], trials: int) -> list[dict[str, float]]:
    """Scrambled Halton points, log-uniform between the bounds.

    The coordinates are, in this order, differences to one (momentum), the rate, and all else by name: optimisers whose
    options are called differently get the same points.
    """
    cube = qmc.Halton(d=len(search), scramble=True, rng=0).random(trials)
    names = sorted(search, key=lambda name: (not name.startswith("1-"), name != "lr", name))
    return [
        {
            name: float(search[name][0] * (search[name][1] / search[name][0]) ** u)
            for name, u in zip(names, point, strict=True)
        }
        for point in cube
    ]


def with_values(block: Mapping[str, Any], values: Mapping[str, float]) -> tuple[float, dict[str, Any]]:
    """The learning rate, and an optimiser's options with a trial's values set at their dotted places."""
    options = deepcopy(Block.of(block).options)
    for name, value in values.items():
        if name == "lr":
            continue
        place, number = (name[2:], 1 - value) if name.startswith("1-") else (name, value)
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        target: Any = options
        for part in path:
            target = target[part]
        target[last] = number
    return values["lr"], options


def _train(
    context: Context,
    dataset: str,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    task: Mapping[str, Any],
    batch_size: int,
    values: Mapping[str, float],
    seed: int,
) -> dict[str, Any]:
    """One run from scratch: its hyper-parameters, and where it ended."""
    data = context.dataset(dataset)
    lr, options = with_values(optimizer, values)
    network = initial_model(model, data, seed).to(context.device)
    loss, draws = task.get("loss", "cross_entropy"), derived_seed(seed, "optimizer")
    opt = registry.build(optimizer["kind"], options, network, data.num_classes, lr, loss, draws)
    state = fit(network, opt, data, Task(**task), batch_size, seed, progress=False)
    last = state.rows[-1]
    with opt.evaluated():
        accuracies = class_accuracies(network, data) if state.status == "finished" else [math.nan]
    return {
        **values,
        "status": state.status,
        "steps": state.step,
        "start_loss": state.rows[0]["val_loss"],
        **{name: last.get(column, math.nan) for name, column in ENDS.items()},
        "worst_class_accuracy": min(accuracies),
        "mean_class_accuracy": sum(accuracies) / len(accuracies),
        "wall_s": state.wall_s,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


@torch.no_grad()
def class_accuracies(model: nn.Module, data: DataSet) -> list[float]:
    """Share of each class's validation examples that are recognised, in evaluation mode; of classes that have any."""
    model.eval()
    right = torch.zeros(data.num_classes)
    count = torch.zeros(data.num_classes)
    for inputs, targets in data.batches("validation", 1000):
        hit = (call(model, inputs).argmax(1) == targets).float().cpu()
        right.index_add_(0, targets.cpu(), hit)
        count.index_add_(0, targets.cpu(), torch.ones_like(hit))
    return (right / count)[count > 0].tolist()
