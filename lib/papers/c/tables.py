"""Tables of paper C. No torch here: table jobs start fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from papers.common.runs import Tables, best_rates, last_rows

ROWS = {
    "sgd": "SGD + momentum",
    "adam": "Adam",
    "levenberg-marquardt": "Levenberg-Marquardt",
    "bfgs": "BFGS",
    "curveball": "CurveBall",
    "curveball-searched": "CurveBall",
}
"""Rows of table 1, and one of ours: CurveBall with its first λ searched like the others' settings."""

Published = Mapping[str, Mapping[str, Mapping[str, float]]]


def iterations(tables: Tables, published: Published) -> pd.DataFrame:
    """C-T1: iterations to the tolerance, mean ± s.d. over the runs that reached it, beside the paper's cells."""
    everything = tables["small"]
    final = everything[everything["stage"] == "final"]
    rows: list[dict[str, Any]] = []
    for (problem, solver), part in final.groupby(["problem", "solver"], sort=False):
        paper = published.get(str(solver), {}).get(str(problem), {})
        tried = everything[
            (everything["stage"] == "search") & (everything["problem"] == problem) & (everything["solver"] == solver)
        ]
        rows.append(
            {
                "problem": problem,
                "solver": solver,
                "label": ROWS[str(solver)] + (" (λ searched)" if solver == "curveball-searched" else ""),
                "runs": len(part),
                "reached": int(part["reached"].sum()),
                "mean": part["iterations"].mean(),
                "sd": part["iterations"].std(),
                "paper_mean": paper.get("mean", np.nan),
                "paper_sd": paper.get("sd", np.nan),
                "setting": part["setting"].fillna("").iloc[0] or "none",
                "settings_searched": len(tried),
            }
        )
    return pd.DataFrame(rows)


def search(tables: Tables) -> pd.DataFrame:
    """C-T1s: every setting that was tried for C-T1, its mean count (late runs counting the limit), and the choice."""
    everything = tables["small"]
    tried = everything[everything["stage"] == "search"].copy()
    best = tried.groupby(["problem", "solver"])["iterations"].transform("min")
    tried["chosen"] = (tried["iterations"] == best) & ~tried.duplicated(["problem", "solver", "iterations"])
    return tried[["problem", "solver", "setting", "iterations", "reached", "limit", "chosen"]]


def best_settings(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of each (data set, model, optimiser)'s best learning rate: lowest final training loss, mean over seeds.

    Diverged runs (not finite, or cut short of the longest run) lose to any that finished.
    """
    last = last_rows(metrics)
    longest = last.groupby(["dataset", "model"])["epoch"].transform("max")
    score = last["eval_train_loss"].where(last["epoch"] >= 0.99 * longest)
    keys = ["dataset", "model", "optimizer"]
    chosen = best_rates(last.assign(score=score), keys, "score")
    return metrics.merge(chosen[[*keys, "lr"]], on=[*keys, "lr"])


def errors(tables: Tables, published: Published) -> pd.DataFrame:
    """C-T2: best training and validation error in % over the epochs, mean and s.d. over seeds, beside the paper's.

    One input a network. The learning rate is the best of those tried, by final training loss.
    """
    rows: list[dict[str, Any]] = []
    for network, metrics in tables.items():
        tried = metrics.groupby("optimizer")["lr"].unique()
        chosen = best_settings(metrics).dropna(subset=["eval_train_accuracy"])
        for optimizer, part in chosen.groupby("optimizer", sort=False):
            best = 100 * (1 - part.groupby("seed")[["eval_train_accuracy", "val_accuracy"]].max())
            paper = published.get(network, {}).get(str(optimizer), {})
            rows.append(
                {
                    "network": network,
                    "dataset": part["dataset"].iloc[0],
                    "model": part["model"].iloc[0],
                    "optimizer": optimizer,
                    "lr": part["lr"].iloc[0],
                    "lrs_tried": " ".join(f"{lr:g}" for lr in sorted(tried[optimizer])),
                    "epochs": part["epoch"].max(),
                    "seeds": len(best),
                    "train_error_percent": best["eval_train_accuracy"].mean(),
                    "train_error_sd": best["eval_train_accuracy"].std(),
                    "val_error_percent": best["val_accuracy"].mean(),
                    "val_error_sd": best["val_accuracy"].std(),
                    "paper_train_error_percent": paper.get("train", np.nan),
                    "paper_val_error_percent": paper.get("validation", np.nan),
                }
            )
    return pd.DataFrame(rows)


def costs(tables: Tables) -> pd.DataFrame:
    """C-T3: seconds a step, relative to SGD's, by count of passes, and memory in copies of the parameters."""
    table = tables["costs"]
    grouped = table.groupby(["dataset", "model", "batch_size", "optimizer"], sort=False)
    return grouped.agg(
        rounds=("round", "size"),
        step_s=("step_s", "median"),
        relative=("relative", "median"),
        relative_low=("relative", lambda v: v.quantile(0.1)),
        relative_high=("relative", lambda v: v.quantile(0.9)),
        gradient_evaluations=("gradient_evaluations", "mean"),
        parameter_copies=("parameter_copies", "first"),
    ).reset_index()


def damping_sensitivity(tables: Tables) -> pd.DataFrame:
    """C-T4: best training and validation error against the damping at the start (paper C, section 3), over seeds."""
    metrics = tables["runs"]
    rows: list[dict[str, Any]] = []
    for optimizer, part in metrics.groupby("optimizer", sort=False):
        evaluated = part.dropna(subset=["eval_train_accuracy"])
        best = 100 * (1 - evaluated.groupby("seed")[["eval_train_accuracy", "val_accuracy"]].max())
        last = last_rows(part, ["seed"])
        first = part.dropna(subset="damping").sort_values("step").groupby("seed")["damping"].first()
        rows.append(
            {
                "dataset": part["dataset"].iloc[0],
                "model": part["model"].iloc[0],
                "optimizer": optimizer,
                "damping_after_step_1": first.mean(),
                "last_damping": last["damping"].mean(),
                "epochs": last["epoch"].max(),
                "seeds": len(best),
                "train_error_percent": best["eval_train_accuracy"].mean(),
                "val_error_percent": best["val_accuracy"].mean(),
                "final_train_loss": last_rows(evaluated, ["seed"])["eval_train_loss"].mean(),
            }
        )
    return pd.DataFrame(rows).sort_values("damping_after_step_1")
