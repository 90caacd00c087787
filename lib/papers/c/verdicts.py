"""Verdict rules of paper C's claims, where the general ones of :mod:`papers.common.verdicts` do not do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from papers.c.tables import best_settings
from papers.common.intervals import half_width
from papers.common.outcomes import (
    INCONCLUSIVE,
    Case,
    Estimate,
    Outcome,
    Untested,
    estimate,
    estimate_ratio,
    judge,
    number,
)
from papers.common.rows import Where, cases_of, pick, results
from papers.common.runs import Tables


def cell(
    tables: Tables,
    *,
    reference: float,
    reference_sd: float,
    where: Where,
    mean: str,
    sd: str,
    count: str,
    runs: str,
    least: int,
    table: str | None = None,
) -> Outcome:
    """C1 to C20: a mean over many runs lies within one of the paper's standard deviations of the paper's mean.

    The interval of our mean is Student's t from its standard deviation and the number of runs that got there. Fewer
    than ``least`` runs in all are no test. Where fewer than nine in ten got there, the mean over these alone flatters:
    then it can be above the paper's, and nothing else can be said.
    """
    row = pick(tables, table, where).iloc[0]
    n, tried, value, spread = int(row[count]), int(row[runs]), float(row[mean]), float(row[sd])
    if tried < least:
        raise Untested(f"{number(value)}, s.d. {number(spread)}, {n} of {tried} runs" if n else f"0 of {tried} runs")
    half = half_width(spread, n)
    measured = Estimate(value if n > 1 else math.nan, value - half, value + half, n)
    verdict = judge(measured, reference - reference_sd, reference + reference_sd)
    if n < 0.9 * tried and not measured.low > reference + reference_sd:
        verdict = INCONCLUSIVE
    return Outcome((Case("", measured, verdict, f"s.d. {number(spread)}, {n} of {tried} runs"),))


def at_every_epoch(
    tables: Tables,
    *,
    first: str,
    second: Sequence[str],
    column: str,
    margin: float = 0.0,
    where: Where | None = None,
    table: str | None = None,
) -> Outcome:
    """C21: ``first`` has the lower training error after every epoch, each optimiser at its best learning rate.

    Measured is the share of epochs (after the first evaluation) at which it is lower, by seed.
    """
    found = []
    for name, part in cases_of(pick(tables, table, where), apart=["optimizer", "lr"]):
        curves = _best_curves(part, column, "epoch")
        for other in second:
            if first not in curves or other not in curves:
                continue
            shares = []
            for seed in curves[first].columns.intersection(curves[other].columns):
                both = _side_by_side(curves[first][seed].dropna(), curves[other][seed].dropna())
                if len(both):
                    shares.append(float((both["own"] < both["other"]).mean()))
            share = estimate(shares, margin)
            measured = Estimate(share.value, max(share.low, 0.0), min(share.high, 1.0), share.seeds)
            found.append(Case(f"{name} {first} below {other}".strip(), measured, judge(measured, at_least=1.0)))
    return Outcome(tuple(found))


def at_equal_seconds(
    tables: Tables,
    *,
    first: str,
    second: Sequence[str],
    column: str,
    at_most: float,
    margin: float = 0.0,
    where: Where | None = None,
    table: str | None = None,
) -> Outcome:
    """C23: training error of ``first`` over the best first-order one's, when the quickest optimiser has finished.

    Each optimiser is at its best learning rate; errors are linear in wall-clock between evaluations. A run that
    diverged, cut short of the longest one, has not finished, and an infinite error.
    """
    found = []
    for name, part in cases_of(pick(tables, table, where), apart=["optimizer", "lr"]):
        curves = _best_curves(part, column, "wall_s")
        if first not in curves or not any(other in curves for other in second):
            continue
        names = [first, *(other for other in second if other in curves)]
        epochs = best_settings(part).groupby(["optimizer", "seed"])["epoch"].max()[names]
        whole = epochs >= 0.99 * epochs.max()
        budget = min(float(curves[n][s].dropna().index.max()) for n, s in epochs.index[whole])
        errors = pd.DataFrame(
            {n: {s: _at(curves[n][s], budget) if whole[n, s] else math.inf for s in curves[n]} for n in names}
        )
        best = errors[names[1:]].mean().idxmin()
        measured = estimate_ratio((errors[first] / errors[best]).dropna().tolist(), margin)
        note = f"after {number(budget)} s"
        found.append(Case(f"{name} {first} / {best}".strip(), measured, judge(measured, at_most=at_most), note))
    return Outcome(tuple(found))


def insensitive(
    tables: Tables,
    *,
    column: str,
    key: str,
    at_most: float,
    where: Where | None = None,
    table: str | None = None,
    margin: float = 0.0,
) -> Outcome:
    """C25: the largest final value of ``column`` over the settings ``key``, as a multiple of the smallest, by seed.

    A setting that diverged makes the multiple infinite.
    """
    runs = results(pick(tables, table, where), column, "last", math.inf, [key])
    found = []
    for name, part in cases_of(runs, apart=[key, "optimizer"]):
        last = part.groupby([key, "seed"])["result"].last().unstack(key)
        if last.shape[1] < 2:
            raise Untested(f"two values of {key} or more are needed")
        complete = last.fillna(math.inf)
        multiples = (complete.max(axis=1) / complete.min(axis=1)).fillna(math.inf)
        measured = estimate_ratio(multiples.tolist(), margin)
        found.append(Case(name, measured, judge(measured, at_most=at_most), f"over {last.shape[1]} settings"))
    return Outcome(tuple(found))


def _best_curves(runs: pd.DataFrame, column: str, against: str) -> dict[str, pd.DataFrame]:
    """For each optimiser, at the learning rate that the figures draw it at: the error (1 − accuracy) by seed.

    ``column`` is an accuracy. Rows are values of ``against``, columns seeds.
    """
    rows = best_settings(runs)
    rows = rows[rows[column].notna()].assign(error=1 - rows[column]).sort_values("step")
    if rows.empty:
        raise Untested(f"column {column} is empty")
    return {
        str(optimizer): part.pivot_table(index=against, columns="seed", values="error", aggfunc="last")
        for optimizer, part in rows.groupby("optimizer")
    }


def _side_by_side(own: pd.Series, other: pd.Series) -> pd.DataFrame:
    """Two curves after the start, at the evaluations of the one that goes on longer; infinite where one has ended."""
    grid = max(own.index, other.index, key=max)
    both = pd.DataFrame({"own": own.reindex(grid), "other": other.reindex(grid)}).fillna(math.inf)
    return both[both.index > 0]


def _at(curve: pd.Series, x: float) -> float:
    """The curve at x, linear between its points, constant beyond them."""
    known = curve.dropna()
    return float(np.interp(x, known.index, known))
