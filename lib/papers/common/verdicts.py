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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

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
    number,
)
from papers.common.runs import NETWORK, RUN, SETTING, Tables, best_rates, last_rows

Where = Mapping[str, Any]


def pick(tables: Tables, table: str | None = None, where: Where | None = None) -> pd.DataFrame:
    """The rows of one table (the only one, if not named) that ``where`` describes.

    A condition is a value, a list of values, or ``{above:, below:, at_least:, at_most:}``. Raises ``Untested`` if a
    column is not there or no row is left.
    """
    if table is None and len(tables) != 1:
        raise ValueError(f"the claim reads several tables; name one of {', '.join(tables)}")
    rows = tables[table] if table is not None else next(iter(tables.values()))
    for column, condition in (where or {}).items():
        if column not in rows:
            raise Untested(f"the table has no column {column}")
        rows = rows[_matches(rows[column], condition)]
        if rows.empty:
            raise Untested(f"no row with {column} {condition}")
    return rows


def _matches(column: pd.Series, condition: Any) -> pd.Series:
    if isinstance(condition, Mapping):
        tests = {"above": column.gt, "below": column.lt, "at_least": column.ge, "at_most": column.le}
        keep = pd.Series(True, index=column.index)
        for name, bound in condition.items():
            keep &= tests[name](bound)
        return keep
    return column.isin(condition if isinstance(condition, list) else [condition])


def converged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of eigenvalues, all of which the solver found to its tolerance, or ``Untested``."""
    if "converged" in rows and not rows["converged"].all():
        raise Untested("not all eigenvalues have converged")
    return rows


def pick_every(tables: Tables, table: str | None, where: Where | None, every: str | None) -> pd.DataFrame:
    """:func:`pick`, with a row for each of the values that ``where`` lists of the column ``every``, or ``Untested``."""
    rows = pick(tables, table, where)
    if every and (absent := [one for one in (where or {})[every] if one not in set(rows[every])]):
        raise Untested(f"no row with {every} {absent[0]}")
    return rows


STATISTICS: dict[str, Callable[[pd.Series], float]] = {
    "mean": lambda x: float(x.mean()),
    "median": lambda x: float(x.median()),
    "first": lambda x: float(x.iloc[0]),
    "last": lambda x: float(x.iloc[-1]),
    "min": lambda x: float(x.min()),
    "max": lambda x: float(x.max()),
    "sum": lambda x: float(x.sum()),
    "count": lambda x: float(len(x)),
    "mean_abs": lambda x: float(x.abs().mean()),
    # mean over the later half of the rows
    "late_mean": lambda x: float(x.iloc[len(x) // 2 :].mean()),
    # volatility: standard deviation of the change from one evaluation to the next
    "sd_of_changes": lambda x: float(x.diff().std(ddof=1)),
}


def per_run(
    rows: pd.DataFrame, column: str, statistic: str, extra: Sequence[str] = (), ignore: Sequence[str] = ()
) -> pd.DataFrame:
    """One row a run: its identity, ``extra`` columns, and ``result``, the statistic of ``column`` in step order.

    Empty cells are left out; infinite ones count.
    """
    if column not in rows:
        raise Untested(f"the table has no column {column}")
    keys = [c for c in dict.fromkeys((*RUN, *extra)) if c in rows and c not in ignore]
    rows = rows[rows[column].notna()]
    if rows.empty:
        raise Untested(f"column {column} is empty")
    if "step" in rows:
        rows = rows.sort_values("step", kind="stable")
    if not keys:
        return pd.DataFrame({"result": [STATISTICS[statistic](rows[column])]})
    grouped = rows.groupby(keys, sort=False, dropna=False)[column]
    return grouped.apply(STATISTICS[statistic]).rename("result").reset_index()


def results(
    rows: pd.DataFrame,
    column: str,
    statistic: str,
    worst: float,
    extra: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> pd.DataFrame:
    """:func:`per_run`, in which a run that diverged has the ``worst`` result, whatever it had before.

    Diverged is a run whose ``status`` says so, or whose last row has no finite number in the column or no finite
    minibatch loss, or one that ended before others on its network at its batch size (and of its ``extra`` columns, but
    for optimisers): all of these are equally long. Tables without steps do not say where a run ended.
    """
    runs = per_run(rows, column, statistic, extra, ignore)
    keys = [name for name in runs if name != "result"]
    if "step" not in rows or not keys:
        return runs
    ends = rows.sort_values("step", kind="stable").groupby(keys, sort=False, dropna=False).tail(1)
    gone = ends.loc[_diverged(ends, column, extra), keys]
    every = rows[keys].drop_duplicates().merge(gone.assign(diverged=True), "left")
    every = every.merge(runs, "left")
    every.loc[every["diverged"].notna(), "result"] = worst
    return every.dropna(subset="result")[[*keys, "result"]].reset_index(drop=True)


def _diverged(ends: pd.DataFrame, column: str, extra: Sequence[str]) -> pd.Series:
    """Of the last row of each run: whether the run diverged."""
    found = ~np.isfinite(ends[column].astype(float))
    if "train_loss" in ends:
        found |= (ends["step"] > 0) & ~np.isfinite(ends["train_loss"].astype(float))
    alike = [c for c in (*NETWORK, *extra) if c in ends and c not in ("optimizer", "lr")]
    length = ends.groupby(alike, dropna=False)["step"].transform("max") if alike else ends["step"].max()
    found |= ends["step"] < length
    return found | (ends["status"] == "diverged") if "status" in ends else found


def cases_of(
    runs: pd.DataFrame, by: Sequence[str] = (), apart: Sequence[str] = ()
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, runs) of each case: by the columns named, and by each column of a run's identity that varies.

    ``apart`` columns are what a case compares, so they do not make cases.
    """
    open_columns = [c for c in SETTING if c in runs and c not in (*by, *apart)]
    varying = [c for c in open_columns if runs[c].nunique(dropna=False) > 1]
    columns = [c for c in (*by, *varying) if c in runs]
    if not columns:
        yield "", runs
        return
    for key, part in runs.groupby(columns, sort=False, dropna=False):
        yield ", ".join(_label(c, v) for c, v in zip(columns, key, strict=True)), part


def _label(column: str, value: Any) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return text if isinstance(value, str) else f"{column.replace('_', ' ')} {text}"


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
