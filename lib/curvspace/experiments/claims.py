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
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from curvspace.experiments.intervals import half_width

HOLDS, FAILS, INCONCLUSIVE = "holds", "fails", "inconclusive"
UNTESTED = "not tested at this scale"
VERDICTS = (HOLDS, FAILS, INCONCLUSIVE, UNTESTED)

IDENTITY = ("dataset", "model", "optimizer", "batch_size", "lr")
"""Columns that tell runs apart, besides the seed: where they vary, each value is a case of its own."""

Tables = Mapping[str, pd.DataFrame]
Where = Mapping[str, Any]


class Untested(Exception):
    """The tables do not have what the rule needs; the message says what is missing."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; ``seeds`` is how many independent values stand behind it."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "no number"
        if self.low == self.high:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


@dataclass(frozen=True)
class Case:
    """What was measured for one network, data set or comparison, and what follows from it alone."""

    name: str
    estimate: Estimate
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """All cases of one claim. Raises ``Untested`` where there is none."""

    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise Untested("no row of the tables is about this claim")

    @property
    def verdict(self) -> str:
        """Holds for all cases, or fails for at least one, or else inconclusive."""
        found = {case.verdict for case in self.cases}
        if FAILS in found:
            return FAILS
        return HOLDS if found == {HOLDS} else INCONCLUSIVE

    @property
    def deciding(self) -> Case:
        """The first of the cases that have the claim's verdict: its numbers stand in the ledger's columns."""
        return next((case for case in self.cases if case.verdict == self.verdict), self.cases[0])

    @property
    def seeds(self) -> int:
        """Of the case with the fewest."""
        return min(case.estimate.seeds for case in self.cases)

    @property
    def measured(self) -> str:
        """All cases in words."""
        return "; ".join(
            f"{case.name + ': ' if case.name else ''}{case.estimate}{' (' + case.note + ')' if case.note else ''}"
            for case in self.cases
        )


def number(value: float) -> str:
    """Three significant digits."""
    return format(value, ".3g")


def estimate(values: Sequence[float], margin: float = 0.0, level: float = 0.95) -> Estimate:
    """Mean and Student-t interval over independent values, one a seed.

    One value has no spread: then the interval is value ± ``margin``, the difference that the claim's author would
    not trust a single run to show. Infinite values (diverged runs) have no mean: the median stands in for it and
    the interval is the range. Missing values are left out.
    """
    x = np.asarray([v for v in values if not math.isnan(v)], dtype=float)
    if not len(x):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if not np.isfinite(x).all():
        return Estimate(float(np.median(np.sort(x))), float(x.min()), float(x.max()), len(x))
    mean = float(x.mean())
    half = half_width(float(x.std(ddof=1)), len(x), level) if len(x) > 1 else margin
    return Estimate(mean, mean - half, mean + half, len(x))


def estimate_ratio(ratios: Sequence[float] | np.ndarray, margin: float = 0.0) -> Estimate:
    """The geometric mean of positive ratios with the interval of their logarithms; ``margin`` 0.1 is 10 %."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = estimate(np.log(np.asarray(ratios, dtype=float)).tolist(), math.log1p(margin))
    value, low, high = np.exp([logs.value, logs.low, logs.high]).tolist()
    return Estimate(value, low, high, logs.seeds)


def judge(measured: Estimate, at_least: float | None = None, at_most: float | None = None) -> str:
    """Where the interval lies against the allowed range [at_least, at_most]; an end that is None is open.

    A measure without a number is inconclusive.
    """
    if at_least is None and at_most is None:
        raise ValueError("a rule needs at_least, at_most or both")
    lower = -math.inf if at_least is None else at_least
    upper = math.inf if at_most is None else at_most
    if math.isnan(measured.value):
        return INCONCLUSIVE
    if measured.low >= lower and measured.high <= upper:
        return HOLDS
    if measured.high < lower or measured.low > upper:
        return FAILS
    return INCONCLUSIVE


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
    keys = [c for c in dict.fromkeys((*IDENTITY, "seed", *extra)) if c in rows and c not in ignore]
    rows = rows[rows[column].notna()]
    if rows.empty:
        raise Untested(f"column {column} is empty")
    if "step" in rows:
        rows = rows.sort_values("step", kind="stable")
    if not keys:
        return pd.DataFrame({"result": [STATISTICS[statistic](rows[column])]})
    grouped = rows.groupby(keys, sort=False, dropna=False)[column]
    return grouped.apply(STATISTICS[statistic]).rename("result").reset_index()


def cases_of(
    runs: pd.DataFrame, by: Sequence[str] = (), apart: Sequence[str] = ()
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, runs) of each case: by the columns named, and by each column of a run's identity that varies.

    ``apart`` columns are what a case compares, so they do not make cases.
    """
    open_columns = [c for c in IDENTITY if c in runs and c not in (*by, *apart)]
    varying = [c for c in open_columns if runs[c].nunique(dropna=False) > 1]
    columns = [c for c in (*by, *varying) if c in runs]
    if not columns:
        yield "", runs
        return
    for key, part in runs.groupby(columns, sort=False, dropna=False):
        yield " ".join(_label(c, v) for c, v in zip(columns, key, strict=True)), part


def _label(column: str, value: Any) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return text if isinstance(value, str) else f"{column} {text}"


def threshold(
    tables: Tables,
    *,
    column: str = "value",
    table: str | None = None,
    where: Where | None = None,
    statistic: str = "mean",
    by: Sequence[str] = (),
    ignore: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    margin: float = 0.0,
) -> Outcome:
    """One number a run, its mean over seeds against the allowed range.

    ``statistic`` reduces a run's rows (``STATISTICS``). A count that must be exact is a range of ± 0.5 around it.
    """
    runs = per_run(pick(tables, table, where), column, statistic, by, ignore)
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
    lower_is_better: bool = True,
    by: Sequence[str] = (),
    ignore: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    margin: float = 0.0,
) -> Outcome:
    """``first`` against each ``second`` of the column ``key``: difference or ratio (first / second), paired by seed.

    Ratios are averaged on the log scale. ``tuned`` names a column (the learning rate) over which each side takes its
    best value: the one with the best mean over seeds, by ``lower_is_better``; runs that did not finish count as worst.
    """
    if relation not in ("difference", "ratio"):
        raise ValueError(f"relation must be 'difference' or 'ratio', got {relation!r}")
    runs = per_run(pick(tables, table, where), column, statistic, (*by, key), ignore)
    found = []
    for name, part in cases_of(runs, by, apart=[key, *([tuned] if tuned else [])]):
        for one in _names(first):
            for other in _names(second):
                sides = [_side(part[part[key] == side], tuned, lower_is_better) for side in (one, other)]
                if any(side.empty for side in sides):
                    continue
                measured = _compare(sides[0], sides[1], relation, margin)
                label = f"{name} {one} / {other}" if relation == "ratio" else f"{name} {one} - {other}"
                found.append(Case(label.strip(), measured, judge(measured, at_least, at_most)))
    return Outcome(tuple(found))


def _names(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _side(runs: pd.DataFrame, tuned: str | None, lower_is_better: bool) -> pd.Series:
    """Results by seed, at the best value of ``tuned``."""
    if tuned and not runs.empty:
        worst = math.inf if lower_is_better else -math.inf
        means = runs.assign(result=runs["result"].fillna(worst)).groupby(tuned)["result"].mean()
        runs = runs[runs[tuned] == (means.idxmin() if lower_is_better else means.idxmax())]
    seeds = runs["seed"] if "seed" in runs else pd.Series(range(len(runs)), index=runs.index)
    return pd.Series(runs["result"].to_numpy(float), index=seeds.to_numpy())


def _compare(first: pd.Series, second: pd.Series, relation: str, margin: float) -> Estimate:
    common = first.index.intersection(second.index)
    a, b = first[common].to_numpy(), second[common].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        return estimate((a - b).tolist(), margin) if relation == "difference" else estimate_ratio(a / b, margin)


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
        measured = proportion(int((part[column] > limit).sum()), int(part[column].notna().sum()), _seeds(part))
        found.append(Case(name, measured, judge(measured, at_least, at_most), f"{len(part)} rows"))
    return Outcome(tuple(found))


def proportion(successes: int, total: int, seeds: int) -> Estimate:
    """A share with Wilson's 95 % interval."""
    if not total:
        return Estimate(math.nan, math.nan, math.nan, seeds)
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
        found.append(Case(name, measured, judge(measured, at_least, at_most), f"{len(part)} rows"))
    return Outcome(tuple(found))


def spearman(rows: pd.DataFrame, x: str, y: str, least_rows: int = 5) -> Estimate:
    """Spearman's correlation with Fisher's interval; no number below ``least_rows`` finite rows."""
    if missing := [c for c in (x, y) if c not in rows]:
        raise Untested(f"the table has no column {missing[0]}")
    pairs = rows[[x, y]].replace([np.inf, -np.inf], np.nan).dropna()
    if len(pairs) < max(least_rows, 4) or pairs[x].nunique() < 2 or pairs[y].nunique() < 2:
        return Estimate(math.nan, math.nan, math.nan, _seeds(rows))
    rho = float(stats.spearmanr(pairs[x], pairs[y]).statistic)
    z, half = math.atanh(np.clip(rho, -0.999999, 0.999999)), 1.96 * 1.03 / math.sqrt(len(pairs) - 3)
    return Estimate(rho, math.tanh(z - half), math.tanh(z + half), _seeds(rows))
