"""Verdicts on claims: from tidy tables to "holds", "fails" or "inconclusive".

A rule is a function ``rule(tables, **options) -> Outcome``: it picks rows, reduces each run to one number, puts an
interval around the mean over seeds, and compares the interval with the range that the claim allows:

- the interval lies inside the range: the claim holds;
- it lies outside: the claim fails;
- it straddles an end: inconclusive.

A claim about several networks has one case for each; it holds if it holds for all, and fails if it fails for one.
No rule imports torch: the ledger is made from tables alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from papers.common.outcomes import (
    FAILS,
    HOLDS,
    INCONCLUSIVE,
    Case,
    Estimate,
    Outcome,
    Ratio,
    Untested,
    estimate,
    estimate_ratio,
    judge,
)
from papers.common.rows import Where, cases_of, per_run, pick, pick_every, results
from papers.common.runs import SETTING, Tables, best_rates, last_rows


def threshold(
    tables: Tables,
    *,
    column: str = "value",
    table: str | None = None,
    where: Where | None = None,
    statistic: str = "mean",
    by: Sequence[str] = (),
    ignore: Sequence[str] = (),
    every: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    around: float | None = None,
    tolerance: float = 0.0,
    margin: float = 0.0,
) -> Outcome:
    """One number a run, its mean over seeds against the allowed range, which may be ``around`` ± ``tolerance``.

    ``statistic`` reduces a run's rows (``STATISTICS``). A count that must be exact is a range of ± 0.5 around it.
    ``every`` names a column of ``where``: each value listed there must have a row.
    """
    if around is not None:
        at_least, at_most = around - tolerance, around + tolerance
    runs = per_run(pick_every(tables, table, where, every), column, statistic, by, ignore)
    found = []
    for name, part in cases_of(runs, by):
        measured = estimate(part["result"].tolist(), margin)
        found.append(Case(name, measured, judge(measured, at_least, at_most)))
    return Outcome(tuple(found))


def ordering(
    tables: Tables,
    *,
    first: str | Sequence[str],
    second: str | Sequence[str],
    column: str,
    key: str = "optimizer",
    table: str | None = None,
    where: Where | None = None,
    statistic: str = "last",
    relation: str = "difference",
    tuned: str | None = None,
    lower_is_better: bool | None = None,
    by: Sequence[str] = (),
    ignore: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    margin: float = 0.0,
) -> Outcome:
    """``first`` against each ``second`` of the column ``key``: difference or ratio (first / second), paired by seed.

    Ratios are averaged on the log scale. A run that diverged (:func:`results`) counts as worst, by ``lower_is_better``
    (None: of all but accuracies); on a seed where both sides diverged neither is better, and where they did on all
    seeds there is no number. ``tuned`` names a column (the learning rate) over which each side takes its best value:
    the one with the best mean over seeds.
    """
    if relation not in ("difference", "ratio"):
        raise ValueError(f"relation must be 'difference' or 'ratio', got {relation!r}")
    if lower_is_better is None:
        lower_is_better = "accuracy" not in column
    worst = math.inf if lower_is_better else -math.inf
    runs = results(pick(tables, table, where), column, statistic, worst, (*by, key), ignore)
    found = []
    for name, part in cases_of(runs, by, apart=[key, *([tuned] if tuned else [])]):
        for one in _names(first):
            for other in _names(second):
                sides = [_side(part[part[key] == side], tuned, lower_is_better) for side in (one, other)]
                if any(side.empty for side in sides):
                    continue
                measured = compare(sides[0], sides[1], relation, margin)
                label = f"{name} {one} / {other}" if relation == "ratio" else f"{name} {one} - {other}"
                found.append(Case(label.strip(), measured, judge(measured, at_least, at_most)))
    return Outcome(tuple(found))


def _names(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _side(runs: pd.DataFrame, tuned: str | None, lower_is_better: bool) -> pd.Series:
    """Results by seed, at the best value of ``tuned``."""
    if tuned and not runs.empty:
        runs = runs[runs[tuned] == best_rates(runs, [], "result", tuned, lower_is_better)[tuned].iloc[0]]
    seeds = runs["seed"] if "seed" in runs else pd.Series(range(len(runs)), index=runs.index)
    return pd.Series(runs["result"].to_numpy(float), index=seeds.to_numpy())


def compare(first: pd.Series, second: pd.Series, relation: str, margin: float) -> Estimate:
    """Difference or ratio of two sides by seed; sides that both diverged on a seed are equal there."""
    common = first.index.intersection(second.index)
    a, b = first[common].to_numpy(float), second[common].to_numpy(float)
    ratio = relation == "ratio"
    if ratio:  # of what is better if larger, the worst is 0
        a, b = (np.where(np.isneginf(x), 0.0, x) for x in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = a / b if ratio else a - b
    both = (a == b) & (np.isinf(a) | (ratio & (a == 0)))
    measured = np.full_like(a, math.nan) if both.all() else np.where(both, float(ratio), measured)
    return estimate_ratio(measured, margin) if ratio else estimate(measured.tolist(), margin)


def share(
    tables: Tables,
    *,
    column: str,
    above: float | str,
    table: str | None = None,
    where: Where | None = None,
    by: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Outcome:
    """Share of rows in which ``column`` is above a number or above another column, with Wilson's 95 % interval."""
    rows = pick(tables, table, where)
    found = []
    for name, part in cases_of(rows, by):
        if isinstance(above, str) and above not in part:
            raise Untested(f"the table has no column {above}")
        limit = part[above] if isinstance(above, str) else above
        known = part[column].notna() & pd.Series(limit, index=part.index).notna()
        measured = proportion(int((part[column] > limit).sum()), int(known.sum()), _seeds(part))
        found.append(Case(name, measured, judge(measured, at_least, at_most), f"{known.sum()} rows"))
    return Outcome(tuple(found))


def proportion(successes: int, total: int, seeds: int) -> Estimate:
    """A share with Wilson's 95 % interval."""
    if not total:
        return Estimate(math.nan, math.nan, math.nan, seeds)
    from scipy import stats  # takes a second to import, which no plan needs

    interval = stats.binomtest(successes, total).proportion_ci(method="wilson")
    return Estimate(successes / total, float(interval.low), float(interval.high), seeds)


def _seeds(rows: pd.DataFrame) -> int:
    return int(rows["seed"].nunique()) if "seed" in rows else 1


def rank_correlation(
    tables: Tables,
    *,
    x: str,
    y: str,
    table: str | None = None,
    where: Where | None = None,
    by: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    least_rows: int = 5,
) -> Outcome:
    """Spearman's rank correlation of two columns over rows; 95 % interval by Fisher's z with s.d. 1.03/√(n − 3)."""
    rows = pick(tables, table, where)
    found = []
    for name, part in cases_of(rows, by):
        measured = spearman(part, x, y, least_rows)
        known = np.isfinite(part[[x, y]].astype(float)).all(axis=1).sum()
        found.append(Case(name, measured, judge(measured, at_least, at_most), f"{known} rows"))
    return Outcome(tuple(found))


def spearman(rows: pd.DataFrame, x: str, y: str, least_rows: int = 5) -> Estimate:
    """Spearman's correlation with Fisher's interval; no number below ``least_rows`` finite rows."""
    if missing := [c for c in (x, y) if c not in rows]:
        raise Untested(f"the table has no column {missing[0]}")
    pairs = rows[[x, y]].replace([np.inf, -np.inf], np.nan).dropna()
    if len(pairs) < max(least_rows, 4) or pairs[x].nunique() < 2 or pairs[y].nunique() < 2:
        return Estimate(math.nan, math.nan, math.nan, _seeds(rows))
    from scipy import stats

    rho = float(stats.spearmanr(pairs[x], pairs[y]).statistic)
    z, half = math.atanh(np.clip(rho, -0.999999, 0.999999)), 1.96 * 1.03 / math.sqrt(len(pairs) - 3)
    return Estimate(rho, math.tanh(z - half), math.tanh(z + half), _seeds(rows))


def per_step(
    tables: Tables,
    *,
    column: str,
    table: str | None = None,
    where: Where | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    margin: float = 0.0,
) -> Outcome:
    """A cost that a run adds up (passes, products), for one step: its last value over the number of steps."""
    rows = pick(tables, table, where)
    found = []
    for name, part in cases_of(rows):
        last = last_rows(part, ["seed"])
        measured = estimate((last[column] / last["step"]).tolist(), margin)
        found.append(Case(name, measured, judge(measured, at_least, at_most)))
    return Outcome(tuple(found))


def against_reference(
    tables: Tables,
    *,
    column: str | Sequence[str],
    reference: str | Sequence[str],
    tolerance: float,
    by: Sequence[str],
    where: Where | None = None,
    margin: float = 0.0,
    table: str | None = None,
) -> Outcome:
    """B2 to B10, B13, B15, C22: each row's value within ``tolerance`` of the paper's, the column ``reference``.

    Several columns have as many references. A value that is missing decides nothing, so the claim does not hold then.
    """
    rows = pick(tables, table, where)
    pairs = [(column, reference)] if isinstance(column, str) else list(zip(column, reference, strict=True))
    found = []
    for own, other in pairs:
        known = rows[rows[other].notna()]
        for name, part in cases_of(known, by, apart=SETTING):
            expected = float(part[other].iloc[0])
            measured = estimate(part[own].tolist(), margin)
            if "seeds" in part:  # each value is a mean over so many
                measured = replace(measured, seeds=int(part["seeds"].sum()))
            verdict = judge(measured, expected - tolerance, expected + tolerance)
            label = name if len(pairs) == 1 else f"{name} {own}"
            found.append(Case(label, measured, verdict, f"paper {expected:g}"))
    return Outcome(tuple(found))


def given_interval(
    tables: Tables,
    *,
    value: str,
    low: str,
    high: str,
    seeds: str,
    by: Sequence[str],
    where: Where | None = None,
    bound: str | None = None,
    bound_below: str | None = None,
    best_of: str | None = None,
    every: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    table: str | None = None,
) -> Outcome:
    """X1 to X3, X5 to X16: each row's ratio with its interval, as its table gives them, against the allowed range.

    A row without an interval (one seed) has no verdict. ``bound`` names a column that marks values which are upper
    bounds only, ``bound_below`` one that marks lower bounds: the interval is open to that side. With ``best_of`` the
    rows that differ in that column alone are variants of one method, and the one with the best verdict speaks for all.
    ``every`` names a column of ``where``: each value listed there must have a row.
    """
    rows = pick_every(tables, table, where, every)
    found: dict[str, list[Case]] = {}
    for name, part in cases_of(rows, [*by, *([best_of] if best_of else [])]):
        row = part.iloc[0]
        middle, lower, upper = (float(row[column]) for column in (value, low, high))
        known = not (math.isnan(lower) or math.isnan(upper))
        above, below = (name is not None and bool(row[name]) for name in (bound, bound_below))
        measured = Ratio(middle, lower if known else middle, upper if known else middle, int(row[seeds]))
        allowed = replace(measured, low=0.0 if above else lower, high=math.inf if below else upper)
        verdict = judge(allowed, at_least, at_most) if known else INCONCLUSIVE
        note = " and ".join(word for word, so in (("at most", above), ("at least", below)) if so)
        key = " ".join(str(row[column]) for column in by)
        found.setdefault(key, []).append(Case(name, measured, verdict, note))
    order = (HOLDS, INCONCLUSIVE, FAILS)
    return Outcome(tuple(case for cases in found.values() for case in _chosen(cases, best_of is not None, order)))


def _chosen(cases: list[Case], best: bool, order: Sequence[str]) -> list[Case]:
    return [min(cases, key=lambda case: order.index(case.verdict))] if best else cases
