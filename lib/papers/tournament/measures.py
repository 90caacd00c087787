r"""The tournament: every optimiser at its own best learning rate, found on the same grid with the same budget.

Each optimiser runs once at every learning rate of the grid on a tuning seed; the one with the lowest loss at the end
of the budget is run again on other seeds, and only these runs are compared. The largest stable learning rate is found
apart from that, by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from curvspace.datasets import DataSet
from curvspace.optim import registry
from curvspace.seeds import derived_seed
from curvspace.training.loop import FitState, fit
from curvspace.training.record import initial_model
from curvspace.training.spec import Block, Task
from papers.common.context import Context
from papers.common.runs import best_rates

COLUMNS = (
    *("dataset", "model", "optimizer", "batch_size", "lr", "seed", "phase", "status", "step", "epoch"),
    *("gradient_evaluations", "wall_s", "eval_train_loss", "val_loss", "val_accuracy", "parameters"),
)


@dataclass(frozen=True)
class Entrant:
    """One optimiser on one network: data, the blocks of the config by which both are built, the budget."""

    data: DataSet
    dataset: str
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    task: Task
    batch_size: int
    device: torch.device

    def train(self, lr: float, seed: int) -> tuple[FitState, pd.DataFrame]:
        """A run from scratch: its state at the end, and its evaluations as rows with what they had cost."""
        model = initial_model(self.model, self.data, seed).to(self.device)
        block = Block.of(self.optimizer)
        draws = derived_seed(seed, "optimizer")
        optimizer = registry.build(block.kind, block.options, model, self.data.num_classes, lr, self.task.loss, draws)
        state = fit(model, optimizer, self.data, self.task, self.batch_size, seed, progress=False)
        rows = pd.DataFrame([row for row in state.rows if "val_loss" in row])
        if "gradient_evaluations" not in rows:  # diverged at once: only the evaluation of the start
            rows["gradient_evaluations"] = 0.0
        identity = {
            "dataset": self.dataset,
            "model": self.model["name"],
            "optimizer": self.optimizer["name"],
            "batch_size": self.batch_size,
            "lr": lr,
            "seed": seed,
            "status": state.status,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        return state, rows.assign(**identity).fillna({"gradient_evaluations": 0.0})


def _entrant(context: Context, dataset: str, model: Any, optimizer: Any, task: Any, batch_size: int) -> Entrant:
    return Entrant(context.dataset(dataset), dataset, model, optimizer, Task(**task), batch_size, context.device)


def race(
    context: Context,
    dataset: str,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    task: Mapping[str, Any],
    batch_size: int,
    lrs: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
) -> pd.DataFrame:
    """A-X2 for one optimiser on one network: one row per evaluation of each run, ``phase`` tuning or final.

    The learning rate of the final runs is the one with the lowest
    :func:`closing_loss`, averaged over the tuning seeds. Where none gets through there are no final runs.
    """
    entrant = _entrant(context, dataset, model, optimizer, task, batch_size)
    tables, tried = [], []
    for lr in context.progress(lrs, f"tuning {optimizer['name']} on {model['name']}"):
        for seed in tuning_seeds:
            rows = entrant.train(lr, seed)[1]
            tables.append(rows.assign(phase="tuning"))
            tried.append({"lr": lr, "loss": closing_loss(rows)})
    best, loss = best_rates(pd.DataFrame(tried), [], "loss").iloc[0]
    if math.isfinite(loss):
        for seed in context.progress(seeds, f"{optimizer['name']} at lr={best:g}"):
            tables.append(entrant.train(float(best), seed)[1].assign(phase="final"))
    return pd.concat(tables, ignore_index=True).reindex(columns=list(COLUMNS))


def closing_loss(run: pd.DataFrame, column: str = "val_loss") -> float:
    """What tuning goes by: the mean loss of the last quarter of a run's evaluations; infinite if it diverged.

    The last evaluation alone is a matter of luck at the rates that matter, near the edge of stability.
    """
    rows = run.sort_values("step")
    losses = rows[column].to_numpy(float)[-max(1, len(rows) // 4) :]
    through = (rows["status"] == "finished").all() and np.isfinite(losses).all()
    return float(losses.mean()) if through else np.inf


def largest_stable_lr(
    context: Context,
    dataset: str,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    task: Mapping[str, Any],
    batch_size: int,
    lrs: Sequence[float],
    seeds: Sequence[int],
    halvings: int,
) -> pd.DataFrame:
    r"""A-X3: the largest learning rate at which a short run is stable, by bisection of :math:`\log\eta`.

    See :func:`is_stable`. The grid ``lrs`` is tried from its upper end downwards until a rate is stable; the interval
    to the next is then halved ``halvings`` times. One row per seed: ``stable_lr`` is the largest rate found stable
    and ``unstable_lr`` the smallest found unstable above it. ``stable_lr`` is NaN where no rate of the grid is stable,
    ``unstable_lr`` where its largest is.
    """
    entrant = _entrant(context, dataset, model, optimizer, task, batch_size)
    identity = {"dataset": dataset, "model": model["name"], "optimizer": optimizer["name"], "batch_size": batch_size}
    rows = []
    for seed in context.progress(seeds, f"stability of {optimizer['name']} on {model['name']}"):

        def stable(lr: float, seed: int = seed) -> bool:
            return is_stable(entrant.train(lr, seed)[0])

        found = edge_of_stability(stable, sorted(lrs), halvings)
        rows.append({**identity, "seed": seed, "stable_lr": found[0], "unstable_lr": found[1]})
    return pd.DataFrame(rows)


def is_stable(state: FitState, progress: float = 0.05) -> bool:
    """Whether a run came to its end and learned: its training loss fell by at least this part of the first.

    A run that survives on a plateau of dead units has not been stable, though its loss is finite.
    """
    end = state.rows[-1].get("eval_train_loss", math.nan)
    return state.status == "finished" and end < (1 - progress) * state.initial_loss


def edge_of_stability(stable: Callable[[float], bool], grid: Sequence[float], halvings: int) -> tuple[float, float]:
    """(largest stable, smallest unstable above it) of an ascending grid, refined by halving the logarithmic gap."""
    above = math.nan
    for lr in reversed(grid):
        if stable(lr):
            break
        above = lr
    else:
        return math.nan, above
    low, high = lr, above
    for _ in range(halvings if math.isfinite(above) else 0):
        middle = math.sqrt(low * high)
        if stable(middle):
            low = middle
        else:
            high = middle
    return low, high
