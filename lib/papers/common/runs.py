"""Runs in tidy tables: the columns that tell them apart, and the choice of a best learning rate. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from curvspace.training.record import RunRecord

Tables = Mapping[str, pd.DataFrame]
NETWORK = ["dataset", "model", "batch_size"]
SETTING = ["dataset", "model", "optimizer", "batch_size", "lr"]
"""The columns that tell runs apart, besides the seed."""
RUN = [*SETTING, "seed"]


def tidy(run: RunRecord, rows: Sequence[Mapping[str, Any]], **constants: Any) -> pd.DataFrame:
    """Rows measured on one run as a table: its identity first, then what is the same in all rows."""
    return pd.DataFrame([{**run.identity, **constants, **row} for row in rows])


def last_rows(metrics: pd.DataFrame, keys: Sequence[str] = RUN) -> pd.DataFrame:
    """The row of the last step of each run."""
    return metrics.sort_values("step").groupby(list(keys), sort=False).tail(1)


def best_rates(
    results: pd.DataFrame, by: Sequence[str], score: str, rate: str = "lr", lower_is_better: bool = True
) -> pd.DataFrame:
    """The best learning rate of each group: that of the best mean ``score`` over seeds. Columns ``by``, rate, score.

    results: one row a run. A run whose score is not finite has diverged, and its rate loses to every rate at which all
    runs came through; a group without such a rate keeps the first that was tried, with the worst score, ±∞. Of equal
    rates the first is taken.
    """
    worst = np.inf if lower_is_better else -np.inf
    scores = results[score].astype(float).where(np.isfinite(results[score].astype(float)), worst)
    keys = [*by, rate]
    means = results.assign(**{score: scores}).groupby(keys, sort=False)[score].mean().reset_index()
    ranked = means.sort_values(score, ascending=lower_is_better, kind="stable")
    return (ranked.drop_duplicates(list(by)) if by else ranked.head(1)).reset_index(drop=True)
