"""Verdicts on tables that bring their own intervals: bounds, ratios, the best variant of a method."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Untested
from papers.common.verdicts import given_interval

COLUMNS = {"value": "ratio", "low": "low", "high": "high", "seeds": "n"}


def row(low: float, high: float, optimizer: str = "ours", bound: bool = False, model: str = "cnn") -> dict:
    return {"model": model, "optimizer": optimizer, "ratio": 2.5, "low": low, "high": high, "n": 3, "bound": bound}


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([row(2.1, 3.0)], HOLDS),
        ([row(1.1, 1.9)], FAILS),
        ([row(1.5, 3.0)], INCONCLUSIVE),
        ([row(math.nan, math.nan)], INCONCLUSIVE),
        ([row(2.1, 3.0, bound=True)], INCONCLUSIVE),
        ([row(1.1, 1.9, bound=True)], FAILS),
        ([row(2.1, 3.0), row(1.1, 1.9, model="resnet")], FAILS),
    ],
)
def test_given_interval(rows: list[dict], verdict: str) -> None:
    outcome = given_interval({"t": pd.DataFrame(rows)}, **COLUMNS, by=["model"], bound="bound", at_least=2.0)
    assert outcome.verdict == verdict
    assert outcome.seeds == 3


@pytest.mark.parametrize(
    ("low", "high", "sides", "limit", "verdict"),
    [
        (2.1, 3.0, "above", {"at_least": 2.0}, INCONCLUSIVE),
        (1.1, 1.9, "above", {"at_least": 2.0}, FAILS),
        (1.1, 1.9, "above", {"at_most": 2.0}, HOLDS),
        (2.1, 3.0, "below", {"at_least": 2.0}, HOLDS),
        (1.1, 1.9, "below", {"at_least": 2.0}, INCONCLUSIVE),
        (2.1, 3.0, "below", {"at_most": 2.0}, FAILS),
        (2.1, 3.0, "above below", {"at_least": 2.0}, INCONCLUSIVE),
        (1.1, 1.9, "above below", {"at_least": 2.0}, INCONCLUSIVE),
    ],
)
def test_a_bound_leaves_its_side_open(low, high, sides, limit, verdict) -> None:
    one = row(low, high, bound="above" in sides) | {"bound_below": "below" in sides}
    options = {**COLUMNS, "by": ["model"], "bound": "bound", "bound_below": "bound_below", **limit}
    assert given_interval({"t": pd.DataFrame([one])}, **options).verdict == verdict


def test_an_interval_of_a_ratio_that_says_nothing_is_said_in_words() -> None:
    wide = given_interval({"t": pd.DataFrame([row(0.01, 90.0)])}, **COLUMNS, by=["model"], at_least=2.0)
    assert wide.verdict == "inconclusive"
    assert "[" not in wide.measured
    assert "wider than a factor of 100" in wide.measured
    assert (
        "[1.1, 1.9]"
        in given_interval({"t": pd.DataFrame([row(1.1, 1.9)])}, **COLUMNS, by=["model"], at_least=2).measured
    )


def test_the_best_variant_speaks_for_a_method() -> None:
    table = {"t": pd.DataFrame([row(1.1, 1.9, "every step"), row(2.1, 3.0, "every fifth step")])}
    options = {**COLUMNS, "by": ["model"], "at_least": 2.0}
    assert given_interval(table, **options).verdict == FAILS
    best = given_interval(table, **options, best_of="optimizer")
    assert best.verdict == HOLDS
    assert [case.name for case in best.cases] == ["cnn, every fifth step"]


def test_a_claim_about_each_of_several_waits_for_all_of_them() -> None:
    table = pd.DataFrame([row(1.1, 1.9) | {"model": "first"}, row(1.2, 1.8) | {"model": "second"}])
    asked = {**COLUMNS, "by": ["model"], "at_least": 1.0, "every": "model"}
    assert given_interval({"t": table}, **asked, where={"model": ["first", "second"]}).verdict == "holds"
    with pytest.raises(Untested, match="no row with model third"):
        given_interval({"t": table}, **asked, where={"model": ["first", "second", "third"]})
