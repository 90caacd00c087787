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
WIDE = 100
"""An interval of a ratio with ends further apart than this factor is said in words."""
UNTESTED = "not tested at this scale"
DIVERGED = 1e6
"""A ratio of two losses, or of two other results of runs, beyond this is one with a run that diverged."""
VERDICTS = (HOLDS, FAILS, INCONCLUSIVE, UNTESTED)


class Untested(Exception):
    """The tables do not have what the rule needs; the message says what is missing."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, NaN where it has none; ``seeds``: how many independent values stand behind it."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "no number"
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{number(self.value)} (no interval)"
        if number(self.low) == number(self.high):
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


class Ratio(Estimate):
    """A ratio of two sides: infinite where the first diverged, 0 where the second did."""

    def __str__(self) -> str:
        ends = {0.0: "second diverged", math.inf: "first diverged"}
        if self.low == self.high and self.value in ends:
            return ends[self.value]
        if self.value in ends or self.low in ends or self.high in ends:
            return "no ratio: on some seeds a side diverged"
        if self.high > WIDE * self.low:
            return f"{number(self.value)} (interval wider than a factor of {WIDE})"
        return super().__str__()


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
    """Three significant digits for a reader: 0.123, 12,300, 1.2e+07; an infinite value is that of a diverged run."""
    if math.isinf(value):
        return "diverged"
    text = format(value, ".3g")
    return f"{float(text):,.0f}" if "e" in text and 1 <= abs(value) < 1e7 else text


def estimate(values: Sequence[float], margin: float = 0.0, level: float = 0.95) -> Estimate:
    """Mean and Student-t interval over independent values, one a seed.

    One value has no spread: then the interval is value ± ``margin``, the difference that the claim's author would
    not trust a single run to show; without a margin there is no interval, and so no verdict. Infinite values (diverged
    runs) have no mean: the median stands in for it, and the interval is that of the finite ones, open to their side.
    Missing values are left out.
    """
    x = np.asarray([v for v in values if not math.isnan(v)], dtype=float)
    if not len(x):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(x) == 1 and not margin > 0:
        return Estimate(float(x[0]), math.nan, math.nan, 1)
    if not (finite := np.isfinite(x)).all():
        within = estimate(x[finite].tolist(), margin, level)
        low = float(x.min()) if np.isneginf(x).any() or not finite.any() else within.low
        high = float(x.max()) if np.isposinf(x).any() or not finite.any() else within.high
        return Estimate(float(np.median(np.sort(x))), low, high, len(x))
    mean = float(x.mean())
    half = half_width(float(x.std(ddof=1)), len(x), level) if len(x) > 1 else margin
    return Estimate(mean, mean - half, mean + half, len(x))


def exact(value: float) -> Estimate:
    """A count or an identity, which a rule judges as it is: no interval to estimate."""
    return Estimate(float(value), float(value), float(value), 1)


def estimate_ratio(ratios: Sequence[float] | np.ndarray, margin: float = 0.0) -> Estimate:
    """The geometric mean of positive ratios with the interval of their logarithms; ``margin`` 0.1 is 10 %.

    A ratio above :data:`DIVERGED`, or below its inverse, compares a run with one that diverged: it counts as infinite,
    or as 0. An interval as wide as that says nothing: then there is no interval.
    """
    x = np.asarray(ratios, dtype=float)
    x = np.where(x > DIVERGED, math.inf, np.where(x < 1 / DIVERGED, 0.0, x))
    with np.errstate(divide="ignore"):
        logs = estimate(np.log(x).tolist(), math.log1p(margin))
    value, low, high = np.exp([logs.value, logs.low, logs.high]).tolist()
    if np.isfinite(x).all() and (x > 0).all() and high > DIVERGED * low:
        low = high = math.nan
    return Ratio(value, low, high, logs.seeds)


def judge(measured: Estimate, at_least: float | None = None, at_most: float | None = None) -> str:
    """Where the interval lies against the allowed range [at_least, at_most]; an end that is None is open.

    A measure without a number or without an interval is inconclusive.
    """
    if at_least is None and at_most is None:
        raise ValueError("a rule needs at_least, at_most or both")
    lower = -math.inf if at_least is None else at_least
    upper = math.inf if at_most is None else at_most
    if any(map(math.isnan, (measured.value, measured.low, measured.high))):
        return INCONCLUSIVE
    if measured.low >= lower and measured.high <= upper:
        return HOLDS
    if measured.high < lower or measured.low > upper:
        return FAILS
    return INCONCLUSIVE
