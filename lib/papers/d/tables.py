"""Tables of paper D, from its measures and its runs' metrics. No torch here: table jobs start fast."""

from __future__ import annotations

import numpy as np
import pandas as pd

from papers.common.intervals import interval
from papers.common.runs import RUN, SETTING, Tables, best_rates


def solver_costs(tables: Tables) -> pd.DataFrame:
    """D-C1: products and seconds for LA(20) and SA(3), by solver, and how many times the first's the second takes."""
    table = tables["costs"].copy()
    first = table[table["end"] == "LA"].set_index([*RUN, "solver"])["products"]
    keys = pd.MultiIndex.from_frame(table[[*RUN, "solver"]])
    table["products_over_LA"] = table["products"] / first.reindex(keys).to_numpy()
    return table


def subset_agreement(tables: Tables) -> pd.DataFrame:
    """D-C2: eigenvalues on a part and on all of the training set, their relative difference, and the angles."""
    table = tables["agreement"].copy()
    difference = table["part_eigenvalue"] - table["all_eigenvalue"]
    table.insert(list(table).index("angle_deg"), "relative_difference", difference / table["all_eigenvalue"].abs())
    return table


def scan_speed(tables: Tables) -> pd.DataFrame:
    """D-C3: loss evaluations per second by method, and relative to the loop."""
    table = tables["speed"].copy()
    loop = table[table["method"] == "loop"].set_index(RUN)["evaluations_per_s"]
    table["relative_to_loop"] = (
        table["evaluations_per_s"] / loop.reindex(pd.MultiIndex.from_frame(table[RUN])).to_numpy()
    )
    return table


def rank_correlation(x: pd.Series, y: pd.Series) -> float:
    """Spearman's: the correlation of the ranks, of the pairs in which both are known; NaN for fewer than three."""
    both = pd.DataFrame({"x": x, "y": y}).dropna()
    return float(both["x"].corr(both["y"], method="spearman")) if len(both) >= 3 else np.nan


def by_sign(directions: pd.DataFrame) -> pd.DataFrame:
    """Eigendirections (LA and SA) with ``sign`` "positive" or "negative", of the eigenvalue."""
    table = directions[directions["kind"].isin(["LA", "SA"])].copy()
    table["sign"] = np.where(table["curvature"] > 0, "positive", "negative")
    return table


def line_searches(tables: Tables) -> pd.DataFrame:
    r"""D-T1: what the line searches found, for each sign of the curvature and each kind of direction.

    ``rank_inverse_alpha``, ``rank_inverse_alpha_abs``: Spearman correlation of :math:`1/\alpha^*` with the curvature
    and with its absolute value; ``alpha_times_curvature``: the median of :math:`\alpha^* v^\top H v`, 1 on a quadratic;
    ``improve_nowhere``, ``at_edge``: directions without a gain, and with the best at an end of the range;
    ``share_of_total``: of the summed improvement over all eigendirections.
    """
    table = tables["directions"]
    eigen = by_sign(table)
    groups = [(f"eigenvectors, {sign} curvature", part) for sign, part in eigen.groupby("sign")]
    others = table[~table["kind"].isin(["LA", "SA"])]
    groups += [(str(kind), part) for kind, part in others.groupby("kind")]
    total = eigen["improvement"].sum()
    rows = []
    for name, part in groups:
        product = part["curvature"] / part["inverse_alpha"]
        rows.append(
            {"directions": name, "checkpoints": part["step"].nunique(), "count": len(part)}
            | {"improve_nowhere": int((~part["improves"]).sum()), "at_edge": int(part["at_edge"].sum())}
            | {"rank_inverse_alpha": rank_correlation(part["inverse_alpha"], part["curvature"])}
            | {"rank_inverse_alpha_abs": rank_correlation(part["inverse_alpha"], part["curvature"].abs())}
            | {"alpha_times_curvature": product.median(), "mean_improvement": part["improvement"].mean()}
            | {"largest_improvement": part["improvement"].max(), "total_improvement": part["improvement"].sum()}
            | {"share_of_total": part["improvement"].sum() / total if name.startswith("eigen") and total else np.nan}
            | {"search_radius": part["search_radius"].iloc[0], "examples": part["examples"].iloc[0]}
        )
    first = table.iloc[0]
    return pd.DataFrame([{key: first[key] for key in ("dataset", "model")} | row for row in rows])


def evaluated(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows with an evaluation; the cost at step 0, before anything was spent, is 0."""
    rows = metrics.dropna(subset=["eval_train_loss"]).copy()
    rows["gradient_evaluations"] = rows["gradient_evaluations"].fillna(0.0)
    return rows.sort_values([*RUN, "step"])


def at_budget(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row a run: loss and accuracy when it has spent what the cheapest run to the last step spends in all.

    Cost is in gradient-equivalents; the geometric mean between the two evaluations around the budget. ``diverged``
    runs end before it and have no loss; the budget is not theirs.
    """
    rows = evaluated(metrics)
    last = rows.groupby(RUN).tail(1)
    whole = last[(last["step"] == metrics["step"].max()) & np.isfinite(last["eval_train_loss"])]
    budget = float((last if whole.empty else whole)["gradient_evaluations"].min())
    found = []
    for key, run in rows.groupby(RUN):
        cost = run["gradient_evaluations"].to_numpy()
        reached = cost[-1] >= budget * (1 - 1e-9) and bool(np.isfinite(run["eval_train_loss"]).all())
        loss = np.exp(np.interp(budget, cost, np.log(run["eval_train_loss"].clip(lower=1e-12)))) if reached else np.nan
        accuracy = np.interp(budget, cost, run["val_accuracy"]) if reached else np.nan
        steps = np.interp(budget, cost, run["step"])
        seconds = np.interp(budget, cost, run["wall_s"])
        found.append(
            dict(zip(RUN, key, strict=True))
            | {"budget": budget, "steps": steps, "wall_s": seconds, "diverged": not reached}
            | {"eval_train_loss": loss, "val_accuracy": accuracy}
        )
    return pd.DataFrame(found)


def best_settings(at: pd.DataFrame) -> pd.DataFrame:
    """For each optimiser its learning rate of lowest mean loss at the budget; one that diverges for a seed is out."""
    best = best_rates(at, ["dataset", "model", "optimizer", "batch_size"], "eval_train_loss")
    return best.loc[np.isfinite(best["eval_train_loss"]), SETTING].merge(at, on=SETTING)


def equal_cost(tables: Tables, base: str) -> pd.DataFrame:
    """D-T2: training loss at equal cost for every optimiser and learning rate, against ``base`` at its best one.

    ``ratio_to_base`` is the geometric mean over seeds of the loss over the base's with the same seed, ``ratio_low``
    and ``ratio_high`` its 95 % interval: below 1 throughout, the optimiser pays for itself. ``best`` marks each
    optimiser's best learning rate. A setting that diverged for a seed has no means: one over the others would flatter.
    """
    at = at_budget(tables["runs"])
    best = best_settings(at)
    reference = best[best["optimizer"] == base].set_index("seed")["eval_train_loss"]
    at["log_ratio"] = np.log(at["eval_train_loss"] / reference.reindex(at["seed"]).to_numpy())
    chosen = set(best[["optimizer", "lr"]].itertuples(index=False, name=None))
    rows = []
    for key, part in at.groupby(SETTING):
        setting = dict(zip(SETTING, key, strict=True))
        whole = part.iloc[: 0 if part["diverged"].any() else None]
        ratio, low, high = np.exp(interval(whole["log_ratio"]))
        rows.append(
            setting
            | {"best": (setting["optimizer"], setting["lr"]) in chosen, "seeds": part["seed"].nunique()}
            | {"diverged": int(part["diverged"].sum()), "budget_gradients": part["budget"].iloc[0]}
            | {"steps": part["steps"].mean(), "wall_s": part["wall_s"].mean()}
            | {"train_loss_mean": whole["eval_train_loss"].mean(), "train_loss_sd": whole["eval_train_loss"].std()}
            | {"val_accuracy_mean": whole["val_accuracy"].mean(), "ratio_to_base": ratio}
            | {"ratio_low": low, "ratio_high": high, "base": base}
        )
    return pd.DataFrame(rows).sort_values(["best", "train_loss_mean"], ascending=[False, True], ignore_index=True)
