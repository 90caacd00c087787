"""Tables of paper A, from the metrics of its runs. No torch here: table jobs start fast."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from papers.common.runs import RUN, Tables, last_rows

Published = Mapping[str, Mapping[str, Mapping[str, float]]]
"""The paper's accuracy (%) and loss by optimiser and learning rate."""


def last_evaluation(metrics: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run (always evaluated), with ``diverged``: its validation loss or that of its last minibatch
    is not finite, or more than twice the untrained network's. A validation loss that is not a number is infinite."""
    first = metrics[metrics["step"] == 0].set_index(RUN)["val_loss"]
    last = last_rows(metrics).set_index(RUN).fillna({"val_loss": math.inf})
    reached = last[["val_loss", "train_loss"]].max(axis=1, skipna=False)
    return last.assign(diverged=~(reached < 2 * first.reindex(last.index))).reset_index()


def accuracy_by_lr(tables: Tables, published: Published) -> pd.DataFrame:
    """A-T1: final validation accuracy in %, mean and s.d. over seeds, by learning rate, beside the paper's."""
    return _by_lr(tables["runs"], "val_accuracy", 100.0, "accuracy_percent", published, "accuracy")


def loss_by_lr(tables: Tables, published: Published) -> pd.DataFrame:
    """A-T2: final validation loss, mean and s.d. over seeds, by learning rate, beside the paper's."""
    return _by_lr(tables["runs"], "val_loss", 1.0, "loss", published, "loss")


def _by_lr(
    metrics: pd.DataFrame, column: str, scale: float, name: str, published: Published, printed: str
) -> pd.DataFrame:
    last = last_evaluation(metrics)
    last[name] = scale * last[column]
    grouped = last.groupby(["dataset", "model", "optimizer", "lr"])
    table = grouped.agg(
        seeds=("seed", "nunique"),
        diverged=("diverged", "sum"),
        epochs=("epoch", "max"),
        mean=(name, "mean"),
        sd=(name, "std"),
    ).reset_index()
    table["paper"] = [
        published.get(o.removesuffix("-heavy-ball").removesuffix("-running-average"), {})
        .get(f"{lr:g}", {})
        .get(printed)
        for o, lr in zip(table.optimizer, table.lr, strict=True)
    ]
    table = table.rename(columns={"mean": f"{name}_mean", "sd": f"{name}_sd", "paper": f"paper_{name}"})
    return table.sort_values(["dataset", "model", "lr", "optimizer"], ascending=[True, True, False, True])


def divergence(tables: Tables) -> pd.DataFrame:
    """A-D: which runs above η = 0.1 diverged, at which step they ended, and how far they came."""
    last = last_evaluation(tables["runs"])
    best = tables["runs"].groupby(RUN, sort=False)["val_loss"].min()
    last = last.assign(best_val_loss=best.reindex(pd.MultiIndex.from_frame(last[RUN])).to_numpy())
    columns = [*RUN, "diverged", "step", "epoch", "val_loss", "val_accuracy", "best_val_loss"]
    return last[columns].sort_values(["lr", "optimizer", "seed"]).rename(columns={"step": "last_step"})


def crossovers(metrics: pd.DataFrame, overtaking: str, overtaken: str) -> pd.DataFrame:
    """Where one optimiser overtakes another (A-F2): by batch size, on the training loss, median over seeds.

    ``starts_faster``: ``overtaken`` has the lower loss in one of the first tenth of the evaluations; empty where one of
    the two was not run. ``crossover_step``: the first evaluated step from which on ``overtaking`` stays below to the
    end, after ``overtaken`` was below at some step; empty where there is none. A diverged run counts as infinite from
    there on, and so does not overtake.
    """
    evaluated = metrics[metrics["eval_train_loss"].notna()]
    rows = []
    for batch_size, part in evaluated.groupby("batch_size"):
        epochs = part[part["step"] > 0]
        row = {"batch_size": batch_size, "steps_per_epoch": float((epochs["step"] / epochs["epoch"]).median())}
        if {overtaking, overtaken} <= set(part["optimizer"]):
            both = _medians(part, overtaking, overtaken)
            lead = (both[overtaken] < both[overtaking]).iloc[1:]
            row["starts_faster"] = bool(lead.iloc[: max(1, len(lead) // 10)].any())
            if lead.any() and not lead.iloc[-1] and math.isfinite(both[overtaking].iloc[-1]):
                row["crossover_step"] = lead.index[lead.index > lead[lead].index[-1]][0]
                row["crossover_epoch"] = row["crossover_step"] / row["steps_per_epoch"]
        rows.append(row)
    return pd.DataFrame(rows).reindex(
        columns=["batch_size", "steps_per_epoch", "starts_faster", "crossover_step", "crossover_epoch"]
    )


def _medians(runs: pd.DataFrame, regular: str, other: str) -> pd.DataFrame:
    """The loss of two optimisers by step, median over seeds, at the steps at which all runs of ``regular`` have one.

    A run is infinite after its last evaluation.
    """
    both = runs[runs["optimizer"].isin([regular, other])]
    curves = both.pivot_table(index="step", columns=["optimizer", "seed"], values="eval_train_loss")
    curves = curves.mask(curves.bfill().isna(), math.inf)
    shown = curves[curves[regular].notna().all(axis=1)]
    return pd.DataFrame({name: shown[name].median(axis=1) for name in (regular, other)})
