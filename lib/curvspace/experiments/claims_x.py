"""Verdict rules of our own claims: on tables that bring their own intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from curvspace.experiments.claims import (
    FAILS,
    HOLDS,
    INCONCLUSIVE,
    Case,
    Estimate,
    Outcome,
    Tables,
    Where,
    cases_of,
    judge,
    pick,
)


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
    best_of: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    table: str | None = None,
) -> Outcome:
    """X1 to X3: each row's interval, as its table gives it, against the allowed range.

    A row without an interval (one seed) has no verdict. ``bound`` names a column that marks values which are upper
    bounds only: they can fail, not hold. With ``best_of`` the rows that differ in that column alone are variants of
    one method, and the one with the best verdict speaks for all.
    """
    rows = pick(tables, table, where)
    found: dict[str, list[Case]] = {}
    for name, part in cases_of(rows, [*by, *([best_of] if best_of else [])]):
        row = part.iloc[0]
        middle, lower, upper = (float(row[column]) for column in (value, low, high))
        known = not (math.isnan(lower) or math.isnan(upper))
        limited = bound is not None and bool(row[bound])
        measured = Estimate(middle, lower if known else middle, upper if known else middle, int(row[seeds]))
        verdict = judge(measured, at_least, at_most) if known else INCONCLUSIVE
        if limited and verdict == HOLDS:
            verdict = INCONCLUSIVE
        key = " ".join(str(row[column]) for column in by)
        found.setdefault(key, []).append(Case(name, measured, verdict, "at most" if limited else ""))
    order = (HOLDS, INCONCLUSIVE, FAILS)
    return Outcome(tuple(case for cases in found.values() for case in _chosen(cases, best_of is not None, order)))


def _chosen(cases: list[Case], best: bool, order: Sequence[str]) -> list[Case]:
    return [min(cases, key=lambda case: order.index(case.verdict))] if best else cases
