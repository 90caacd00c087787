"""Student's t-intervals over seeds or runs."""

from __future__ import annotations

import numpy as np
import pandas as pd


def half_width(sd: float, n: int, level: float = 0.95) -> float:
    r""":math:`t_{n-1,(1+p)/2}\, s / \sqrt{n}`: half of the interval of level p for a mean of n values; NaN for n < 2.

    ``sd`` is the sample's standard deviation s, with n - 1 in the denominator.
    """
    from scipy.special import stdtrit  # plans, which draw nothing, import this module too

    return float(stdtrit(n - 1, (1 + level) / 2) * sd / np.sqrt(n)) if n > 1 else np.nan


def interval(values: pd.Series, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and t-interval of the values that are there; the interval is NaN with fewer than two."""
    mean, half = float(values.mean()), half_width(float(values.std()), int(values.count()), level)
    return mean, mean - half, mean + half
