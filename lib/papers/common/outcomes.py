"""What a claim comes to: an estimate with its interval, and the verdict that follows from it.

An interval inside the range that the claim allows: the claim holds; outside: it fails; across an end: inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from papers.common.intervals import half_width

HOLDS, FAILS, INCONCLUSIVE = "holds", "fails", "inconclusive"
UNTESTED = "not tested at this scale"
VERDICTS = (HOLDS, FAILS, INCONCLUSIVE, UNTESTED)


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
