"""Verdict rules of paper B's claims, where the general ones of :mod:`papers.common.verdicts` do not do."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from papers.common.outcomes import (
    FAILS,
    HOLDS,
    Case,
    Estimate,
    Outcome,
    Untested,
    estimate,
    exact,
    judge,
)
from papers.common.rows import cases_of, pick, results
from papers.common.runs import Tables
from papers.common.verdicts import compare


def preserved(
    tables: Tables,
    *,
    classes: int,
    from_step: int,
    top_at_least: float,
    next_share_at_most: float,
    margin: float = 0.0,
    table: str | None = None,
) -> Outcome:
    """B11: overlaps of subspaces found at ``from_step`` or later with those of all later checkpoints.

    For each network the mean overlap of the top k subspaces must stay at or above ``top_at_least``, and that of the
    next k at or below ``next_share_at_most`` of it.
    """
    rows = pick(tables, table, {"start_step": {"at_least": from_step}, "index": classes})
    found = []
    for name, part in cases_of(rows):
        by_seed = part.pivot_table(index="seed", columns="quantity", values="value", aggfunc="mean")
        if not {"top_overlap", "next_overlap"} <= set(by_seed):
            raise Untested("both overlaps, of the top k and of the next k, are needed")
        top = estimate(by_seed["top_overlap"].tolist(), margin)
        rest = estimate((by_seed["next_overlap"] / by_seed["top_overlap"]).tolist(), margin)
        found.append(Case(f"{name} top k".strip(), top, judge(top, at_least=top_at_least)))
        found.append(Case(f"{name} next k / top k".strip(), rest, judge(rest, at_most=next_share_at_most)))
    return Outcome(tuple(found))


def kink(
    tables: Tables,
    *,
    at: int,
    within: int = 1,
    x: str = "dimension",
    y: str = "value",
    margin: float = 0.0,
    table: str | None = None,
) -> Outcome:
    """B12: the mean overlap against the dimension bends at ``at`` ± ``within``: where its slope falls most.

    Curves of several starting steps are averaged first.
    """
    found = []
    for name, part in cases_of(pick(tables, table)):
        breaks = []
        for _, one in part.groupby("seed") if "seed" in part else [(0, part)]:
            curve = one.groupby(x)[y].mean()
            if len(curve) < 5:
                raise Untested(f"a bend needs at least 5 dimensions, got {len(curve)}")
            breaks.append(float(break_point(curve.index.to_numpy(float), curve.to_numpy(float))))
        measured = estimate(breaks, margin)
        found.append(Case(name, measured, judge(measured, at - within - 0.5, at + within + 0.5)))
    return Outcome(tuple(found))


def break_point(x: np.ndarray, y: np.ndarray) -> float:
    """The inner x at which the slope of the broken line through all points falls most."""
    return float(x[1:-1][np.argmin(np.diff(np.diff(y) / np.diff(x)))])


def underdensity(tables: Tables, *, at: int, at_least: float, margin: float = 0.0, table: str | None = None) -> Outcome:
    """B14: eigenvalues are sparse (on the logarithmic axis) around number ``at``, counted from the largest.

    Measured is the widest mean spacing of log λ_i near ``at``, over the widest on either side (the larger of the two):
    the widest of several is above the usual one wherever they lie. Spacings are averaged over seeds; their interval is
    the jackknife's.
    """
    rows = pick(tables, table, {"eigenvalue": {"above": 0}})
    logs = rows.pivot_table(index="seed", columns="index", values="eigenvalue").dropna(axis=1).map(math.log)
    reach = max(2, at // 10)
    if logs.shape[1] < at + 3 * reach + 1 or at - 3 * reach < 1:
        raise Untested(f"eigenvalues up to number {at + 3 * reach + 1} are needed, got {logs.shape[1]}")

    def contrast(values: np.ndarray) -> float:
        spacing = -np.diff(values.mean(axis=0))  # spacing[i - 1] follows eigenvalue number i
        near = spacing[at - 1 - reach : at + reach].max()
        before = spacing[at - 1 - 3 * reach : at - 1 - reach].max()
        after = spacing[at + reach : at + 3 * reach].max()
        return float(near / max(before, after))

    measured = jackknife(logs.to_numpy(), contrast, margin)
    return Outcome((Case("", measured, judge(measured, at_least=at_least)),))


def jackknife(values: np.ndarray, statistic: Callable[[np.ndarray], float], margin: float = 0.0) -> Estimate:
    """A statistic of several rows (seeds) with the interval of its jackknife pseudo-values."""
    n, whole = len(values), statistic(values)
    if n == 1:
        return estimate([whole], margin)
    parts = [n * whole - (n - 1) * statistic(np.delete(values, i, axis=0)) for i in range(n)]
    spread = estimate(parts)
    half = spread.high - spread.value
    return Estimate(whole, whole - half, whole + half, n)


def rise_and_fall(
    tables: Tables, *, rise: float, fall: float, margin: float = 0.0, table: str | None = None
) -> Outcome:
    """B16: the largest eigenvalue peaks at ``rise`` times its start or more, and ends at most at ``fall`` of that."""
    rows = pick(tables, table, {"quantity": "eigenvalue", "index": 1}).sort_values("step")
    found = []
    for name, part in cases_of(rows):
        curves = [one["value"].to_numpy() for _, one in part.groupby("seed")]
        up = estimate([float(c.max() / c[0]) for c in curves], margin)
        down = estimate([float(c[-1] / c.max()) for c in curves], margin)
        found.append(Case(f"{name} peak / start".strip(), up, judge(up, at_least=rise)))
        found.append(Case(f"{name} end / peak".strip(), down, judge(down, at_most=fall)))
    return Outcome(tuple(found))


def toy_exact(tables: Tables, *, tolerance: float = 0.01, table: str | None = None) -> Outcome:
    """B17: the toy model against its exact solution: rank and top eigenvalues late, gradient in the top space always.

    An identity, not an estimate: the worst case over all settings decides.
    """
    rows = pick(tables, table)
    known = rows[rows["expected"].notna()]
    top = known[(known["quantity"] == "eigenvalue") & (known["index"] <= known["classes"])]
    two = top[top["classes"] == 2]
    rank = known[known["quantity"] == "rank"]
    inside = known[known["quantity"].isin(["f_top", "lowest f_top"])]
    checks = {
        "rank less the exact one": ((rank["value"] - rank["expected"]).abs(), 0.0),
        "1 − f_top": ((1 - inside["value"]).abs(), 1e-6),
        "relative error of λ against the exact solution": (top["relative_error"].abs(), tolerance),
        "ληt − 1, two classes": ((two["time_times_value"] - 1).abs(), tolerance),
    }
    found = []
    for name, (errors, limit) in checks.items():
        if errors.empty:
            raise Untested(f"no row for: {name}")
        worst = float(errors.max())
        verdict = HOLDS if worst <= limit and not math.isnan(worst) else FAILS
        found.append(Case(name, exact(worst), verdict))
    return Outcome(tuple(found))


def dominant_and_bulk(
    tables: Tables,
    *,
    full: str,
    dominant: str,
    bulk: str,
    column: str,
    as_well: float,
    stalls: float,
    table: str | None = None,
    margin: float = 0.0,
) -> Outcome:
    """X4: bulk-only SGD ends at most ``as_well`` times SGD's loss, dominant-only at least ``stalls`` times.

    A run that diverged counts as infinite.
    """
    runs = results(pick(tables, table), column, "last", worst=math.inf)
    found = []
    for name, part in cases_of(runs, apart=["optimizer", "lr"]):
        last: pd.DataFrame = part.groupby(["optimizer", "seed"])["result"].last().unstack("optimizer")
        if missing := [o for o in (full, dominant, bulk) if o not in last]:
            raise Untested(f"no run of {missing[0]}")
        for other, limit in ((bulk, {"at_most": as_well}), (dominant, {"at_least": stalls})):
            ratio = compare(last[other].dropna(), last[full].dropna(), "ratio", margin)
            found.append(Case(f"{name} {other} / {full}".strip(), ratio, judge(ratio, **limit)))
    return Outcome(tuple(found))
