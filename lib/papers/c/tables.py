"""Tables of paper C. No torch here: table jobs start fast."""

from __future__ import annotations

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

PAPER_ITERATIONS: dict[str, dict[str, tuple[float, float]]] = {
    "sgd": {"deterministic": (370, 40), "U[0, 1]": (846, 217), "U[0, 3]": (4069, 565), "Rahimi-Recht": (95, 2)},
    "adam": {"deterministic": (799, 160.5), "U[0, 1]": (1290, 476), "U[0, 3]": (2750, 257), "Rahimi-Recht": (95, 5)},
    "levenberg-marquardt": {
        "deterministic": (16, 4),
        "U[0, 1]": (8, 3),
        "U[0, 3]": (11, 5),
        "Rahimi-Recht": (9, 4),
    },
    "bfgs": {"deterministic": (19, 4), "U[0, 1]": (44, 21), "U[0, 3]": (63, 29), "Rahimi-Recht": (43, 21)},
    "curveball": {"deterministic": (13, 0.5), "U[0, 1]": (12, 1), "U[0, 3]": (13, 1), "Rahimi-Recht": (35, 11)},
}
"""Paper C, table 1: mean and s.d."""

PAPER_ERRORS: dict[tuple[str, str], tuple[float, float]] = {
    ("basic", "curveball"): (14.1, 19.9),
    ("basic", "curveball-fixed-damping"): (15.3, 19.3),
    ("basic", "sgd"): (18.9, 21.1),
    ("basic", "adam"): (15.7, 19.7),
    ("basic-bn", "curveball"): (7.6, 16.3),
    ("basic-bn", "curveball-fixed-damping"): (9.4, 15.8),
    ("basic-bn", "sgd"): (10.0, 16.1),
    ("basic-bn", "adam"): (9.6, 16.1),
    ("resnet18", "curveball"): (0.7, 15.3),
    ("resnet18", "curveball-fixed-damping"): (1.3, 16.1),
    ("resnet18", "sgd"): (2.1, 12.8),
    ("resnet18", "adam"): (1.4, 14.0),
    ("resnet18-dropout", "curveball"): (float("nan"), 13.5),
    ("vgg-f", "curveball"): (10.3, 33.5),
    ("vgg-f", "curveball-fixed-damping"): (12.7, 33.8),
    ("vgg-f", "sgd"): (32.9, 41.7),
    ("vgg-f", "adam"): (13.2, 35.9),
}
"""Paper C, table 2: best training and validation error in %, by (network, optimiser)."""


def iterations(tables: Tables) -> pd.DataFrame:
    """C-T1: iterations to the tolerance, mean ± s.d. over the runs that reached it, beside the paper's cells."""
    everything = tables["small"]
    final = everything[everything["stage"] == "final"]
    rows: list[dict[str, Any]] = []
    for (problem, solver), part in final.groupby(["problem", "solver"], sort=False):
        paper = PAPER_ITERATIONS.get(str(solver), {}).get(str(problem), (np.nan, np.nan))
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
                "paper_mean": paper[0],
                "paper_sd": paper[1],
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


def errors(tables: Tables) -> pd.DataFrame:
    """C-T2: best training and validation error in % over the epochs, mean and s.d. over seeds, beside the paper's.

    One input a network. The learning rate is the best of those tried, by final training loss.
    """
    rows: list[dict[str, Any]] = []
    for network, metrics in tables.items():
        tried = metrics.groupby("optimizer")["lr"].unique()
        chosen = best_settings(metrics).dropna(subset=["eval_train_accuracy"])
        for optimizer, part in chosen.groupby("optimizer", sort=False):
            best = 100 * (1 - part.groupby("seed")[["eval_train_accuracy", "val_accuracy"]].max())
            paper = PAPER_ERRORS.get((network, str(optimizer)), (np.nan, np.nan))
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
                    "paper_train_error_percent": paper[0],
                    "paper_val_error_percent": paper[1],
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
    """C-T4: best training and validation error against the damping at the start (paper C, section 3)."""
    metrics = tables["runs"]
    rows: list[dict[str, Any]] = []
    for optimizer, part in metrics.groupby("optimizer", sort=False):
        evaluated = part.dropna(subset=["eval_train_accuracy"])
        best = 100 * (1 - evaluated.groupby("seed")[["eval_train_accuracy", "val_accuracy"]].max())
        last = part.sort_values("step").iloc[-1]
        rows.append(
            {
                "dataset": last["dataset"],
                "model": last["model"],
                "optimizer": optimizer,
                "damping_after_step_1": part.sort_values("step")["damping"].dropna().iloc[0],
                "last_damping": last["damping"],
                "epochs": last["epoch"],
                "seeds": len(best),
                "train_error_percent": best["eval_train_accuracy"].mean(),
                "val_error_percent": best["val_accuracy"].mean(),
                "final_train_loss": last_rows(evaluated, ["seed"])["eval_train_loss"].mean(),
            }
        )
    return pd.DataFrame(rows).sort_values("damping_after_step_1")
