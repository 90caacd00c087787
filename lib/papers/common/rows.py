"""Rows of tidy tables: which ones a claim is about, and one number a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from papers.common.outcomes import (
    Untested,
    number,
)
from papers.common.runs import NETWORK, RUN, SETTING, Tables

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
