"""Tables of paper B: measured values beside the paper's. Pure functions of tidy tables; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from papers.common.runs import SETTING, Tables


def in_order(tables: Mapping[str, pd.DataFrame], order: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """The tables with the labels of ``order`` first; a job's spec does not keep the order of its inputs."""
    return {label: tables[label] for label in [*order, *(label for label in tables if label not in order)]}


def mean_over_steps(rows: pd.DataFrame, column: str) -> float:
    """The mean of one run's column over its steps: each checkpoint stands for the steps since the one before it.

    The first stands for as many as the second. Checkpoints lie close at the start of a run and far apart later.
    """
    known = rows[rows[column].notna()].sort_values("step")
    gaps = np.diff(known["step"])
    return float(np.average(known[column], weights=[gaps[0], *gaps]) if len(gaps) else known[column].mean())


def mean_overlaps(tables: Tables, paper: Mapping[str, float], order: Sequence[str] = ()) -> pd.DataFrame:
    """B-T1: the mean of overlap(g, Hg), eq. 3, over the last steps of training, one row an input.

    ``paper`` has the paper's value by the inputs' labels. Means are :func:`mean_over_steps`, then over seeds.
    ``overlap_sd`` is the standard deviation over checkpoints (and seeds), ``random`` the mean for random vectors,
    ``test_overlap`` that of gradient and Hessian of test examples.
    """

    def mean(part: pd.DataFrame, column: str) -> float:
        return float(pd.Series([mean_over_steps(run, column) for _, run in part.groupby("seed")]).mean())

    rows = []
    for label, table in in_order(tables, order).items():
        parts = dict(iter(table.groupby("split")))
        train = parts["train"]
        rows.append(
            {
                "case": label,
                **train[SETTING].iloc[0].to_dict(),
                "paper": paper.get(label, np.nan),
                "overlap": mean(train, "hg_overlap"),
                "overlap_sd": train["hg_overlap"].std(),
                "random": mean(train, "random"),
                "test_overlap": mean(parts["test"], "hg_overlap") if "test" in parts else np.nan,
                "loss": train.loc[train["step"] == train["step"].max(), "loss"].mean(),
                "first_step": train["step"].min(),
                "last_step": train["step"].max(),
                "checkpoints": train["step"].nunique(),
                "seeds": train["seed"].nunique(),
                **train[["parameters", "examples", "batch_norm"]].iloc[0].to_dict(),
            }
        )
    return pd.DataFrame(rows)


def overlaps_by_epoch(tables: Tables, paper: Mapping[str, float], last: int, order: Sequence[str] = ()) -> pd.DataFrame:
    """B-T6: the mean of overlap(g, Hg) over the last ``last`` steps, had training ended after each whole epoch.

    One row an input and number of epochs; means are :func:`mean_over_steps`, then over seeds. ``overlap_min`` and
    ``overlap_max`` are the least and the largest mean of one seed; ``overlap_sd`` is the standard deviation over
    checkpoints. An epoch's row is there if the run has a checkpoint after the epoch before it.
    """
    rows = []
    for label, table in in_order(tables, order).items():
        last_epoch = int(np.ceil(table["epoch"].max()))
        for epochs in range(1, last_epoch + 1):
            until = table[table["epoch"] <= epochs]
            if until["epoch"].max() <= epochs - 1:
                continue
            end = (until["step"] / until["epoch"]).max() * epochs
            window = until[until["step"] > end - last]
            means = pd.Series([mean_over_steps(run, "hg_overlap") for _, run in window.groupby("seed")])
            rows.append(
                {
                    "variant": label,
                    **table[SETTING].iloc[0].to_dict(),
                    "epochs": epochs,
                    "paper": paper.get(label, np.nan),
                    "overlap": means.mean(),
                    "overlap_min": means.min(),
                    "overlap_max": means.max(),
                    "overlap_sd": window["hg_overlap"].std(),
                    "loss": until.loc[until["step"] == until["step"].max(), "loss"].mean(),
                    "checkpoints": window["step"].nunique(),
                    "seeds": len(means),
                    "examples": table["examples"].iloc[0],
                }
            )
    return pd.DataFrame(rows)


def outlier_count(eigenvalues: Sequence[float] | pd.Series, most: int = 30) -> int:
    """How many eigenvalues stand out: the i up to ``most`` with the largest ratio of the i-th to the next.

    Eigenvalues are sorted first; those that are not positive are left out (the ratio needs both).
    """
    values = np.sort(np.asarray(eigenvalues, dtype=float))[::-1][: most + 1]
    values = values[values > 0]
    if len(values) < 2:
        raise ValueError(f"a gap needs at least 2 positive eigenvalues, got {len(values)}")
    return int(np.argmax(values[:-1] / values[1:])) + 1


def outliers(tables: Tables, paper: Mapping[str, int], order: Sequence[str] = ()) -> pd.DataFrame:
    """B-T2: how many Hessian eigenvalues stand out (:func:`outlier_count`) for true and for changed labels.

    ``gap`` is the ratio behind the count; ``gap_at_k`` and ``gap_at_k_less_1`` are the ratios at k and k - 1, k the
    number of distinct labels.
    """
    rows = []
    for label, table in in_order(tables, order).items():
        values = table[table["quantity"] == "eigenvalue"].sort_values("index")["eigenvalue"].to_numpy()
        ratios = values[:-1] / values[1:]
        row = table.iloc[0]
        k, count = int(row["classes"]), outlier_count(values)
        rows.append(
            {
                "labels": label,
                **row[["dataset", "model", "step", "accuracy", "classes"]].to_dict(),
                "paper": paper.get(label, np.nan),
                "outliers": count,
                "gap": ratios[count - 1],
                "gap_at_k": ratios[k - 1],
                "gap_at_k_less_1": ratios[k - 2] if k > 1 else np.nan,
                "largest": values[0],
                **row[["parameters", "examples", "method"]].to_dict(),
            }
        )
    return pd.DataFrame(rows)


def gradient_sums(tables: Tables, steps: Sequence[int], paper: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """B-T3: sums of c_i² (eq. 12) over 1..k, k+1..2k and 1..2k at some steps, beside the paper's.

    ``paper`` lists ``{step, sum, value}`` with ``sum`` one of "1..k", "k+1..2k", "1..2k".
    """
    known: dict[tuple[int, str], float] = {(int(e["step"]), str(e["sum"])): float(e["value"]) for e in paper}
    rows = []
    for table in tables.values():
        k = int(table.loc[table["quantity"] == "f_top", "index"].iloc[0])
        shares = table[table["quantity"] == "c2"]
        for step in steps:
            part = shares[shares["step"] == step]
            for name, low, high in (("1..k", 1, k), ("k+1..2k", k + 1, 2 * k), ("1..2k", 1, 2 * k)):
                chosen = part[part["index"].between(low, high)]
                rows.append(
                    {
                        **table[["dataset", "model", "seed", "examples"]].iloc[0].to_dict(),
                        "step": step,
                        "sum": name,
                        "paper": known.get((step, name), np.nan),
                        "value": chosen["value"].sum() if len(chosen) == high - low + 1 else np.nan,
                        "null": chosen["null"].sum(),
                    }
                )
    return pd.DataFrame(rows)


def kink(tables: Tables) -> pd.DataFrame:
    """B-T4: where the mean overlap of B-F3 stops rising: the dimension at which it is largest, for each start.

    ``drop_after`` is the fall of the mean overlap from dimension k - 1 to k + 1; ``k_less_1`` is what the paper finds.
    """
    rows = []
    for table in tables.values():
        k = int(table.loc[table["quantity"] == "f_top", "index"].iloc[0])
        found = table[table["quantity"] == "top_overlap"]
        for (seed, start), part in found.groupby(["seed", "start_step"]):
            means = part.groupby("index")["value"].mean()
            rows.append(
                {
                    **table[["dataset", "model", "seed", "parameters", "examples"]].iloc[0].to_dict(),
                    "seed": int(seed),
                    "start_step": int(start),
                    "k_less_1": k - 1,
                    "dimension_of_maximum": int(means.idxmax()),
                    "maximum": means.max(),
                    "drop_after": means.get(k - 1, np.nan) - means.get(k + 1, np.nan),
                    "null": part.groupby("index")["null"].first().get(k - 1, np.nan),
                }
            )
    return pd.DataFrame(rows)


def toy_checks(tables: Tables) -> pd.DataFrame:
    """B-T5: the toy model at the last measured time: each quantity beside what the exact solution says.

    ``relative_error`` is against the exact solution in continuous time, ``time_times_value`` the eigenvalue's
    product with the time, whose limit is 1 for the k top ones. ``lowest f_top``: the lowest of all times measured at
    which the exact solution says what it is.
    """
    (table,) = tables.values()
    inside = table[(table["quantity"] == "f_top") & table["expected"].notna()].sort_values("value")
    lowest = inside.drop_duplicates("case").sort_values("case").assign(quantity="lowest f_top")
    last = pd.concat([table[table["time"] == table["time"].max()], lowest], ignore_index=True)
    last["relative_error"] = last["value"] / last["expected"] - 1
    eigen = last["quantity"] == "eigenvalue"
    last["time_times_value"] = np.where(eigen, last["time"] * last["value"], np.nan)
    listed = last[(~eigen) | (last["index"] <= last["classes"] + 1)]
    case = ["case", "classes", "sigma", "orthonormal", "bias", "start"]
    columns = [*case, "time", "quantity", "index", "value", "expected", "relative_error", "time_times_value"]
    return listed[columns].reset_index(drop=True)
