"""Verdict rules where runs diverged: such a run is the worst by any statistic, and makes no claim surer."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from papers.common import verdicts as claims
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE
from tests.papers.common.made_up import runs


def test_diverged_runs_open_the_interval_of_the_others_without_a_warning() -> None:
    found = claims.estimate([1.0, math.inf, 2.0])
    assert (found.value, found.low, found.high, found.seeds) == (2.0, claims.estimate([1.0, 2.0]).low, math.inf, 3)
    lost = claims.estimate([math.inf, math.inf])
    assert (lost.value, lost.low, lost.high, lost.seeds) == (math.inf, math.inf, math.inf, 2)
    below = claims.estimate([-math.inf, 1.0, 2.0])
    assert (below.low, below.high) == (-math.inf, claims.estimate([1.0, 2.0]).high)
    both = claims.estimate([-math.inf, 1.0, math.inf])
    assert (both.low, both.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        ([1.05, 1.5], 0.0, INCONCLUSIVE),
        ([1.05, math.inf], 0.0, INCONCLUSIVE),  # one number and a run that diverged say no more than two numbers
        ([1.05, math.inf], 0.02, HOLDS),
        ([1.05, math.inf], 0.1, INCONCLUSIVE),
        ([1.4, 1.5, 1.45, math.inf], 0.0, HOLDS),
        ([0.4, 0.5, 0.45, math.inf], 0.0, INCONCLUSIVE),
        ([0.4, 0.5, 0.45, -math.inf], 0.0, FAILS),
    ],
)
def test_a_run_that_diverged_makes_no_claim_surer(values: list[float], margin: float, verdict: str) -> None:
    assert claims.judge(claims.estimate(values, margin), at_least=1.0) == verdict


def test_ordering_with_all_runs_diverged_fails() -> None:
    tables = {"t": runs({"a": [math.inf, math.inf], "b": [1.0, 1.0]})}
    assert claims.ordering(tables, first="a", second="b", column="val_loss", at_most=0.0).verdict == FAILS


def trained(ends: dict[str, list[float]], column: str = "val_loss", **last: float) -> pd.DataFrame:
    """Three evaluations a run, the last of which is given; ``last``: other cells of the last row of "a"."""
    rows = [
        {"optimizer": name, "seed": seed, "step": step, column: value, "train_loss": math.nan if step == 0 else value}
        | (last if name == "a" and step == 20 else {})
        for name, values in ends.items()
        for seed, end in enumerate(values)
        for step, value in ((0, 2.3), (10, 0.3), (20, end))
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("statistic", "column"), [("min", "val_loss"), ("last", "val_loss"), ("last", "val_accuracy")])
@pytest.mark.parametrize("relation", ["difference", "ratio"])
def test_a_run_that_ended_before_the_others_diverged_whatever_its_last_number(statistic, column, relation) -> None:
    """Training ends at the bound of the minibatch loss, which is finite; the step after it may end anywhere."""
    better, worse = (0.9, 0.5) if column == "val_accuracy" else (0.1, 0.5)
    table = trained({"a": [better] * 3, "b": [worse] * 3}, column=column)
    table = table[(table["optimizer"] == "b") | (table["step"] <= 10)]
    table.loc[table["optimizer"] == "a", column] = better
    bound = {("val_accuracy", "difference"): {"at_least": 0.0}, ("val_accuracy", "ratio"): {"at_least": 1.0}}.get(
        (column, relation), {"at_most": 0.0 if relation == "difference" else 1.0}
    )
    options = {"column": column, "statistic": statistic, "relation": relation, **bound}
    outcome = claims.ordering({"t": table}, first="a", second="b", **options)
    assert outcome.verdict == FAILS
    other = pd.concat([table, table.assign(batch_size=1, step=table["step"] * 7)])  # a longer task of its own
    other["batch_size"] = other["batch_size"].fillna(2)
    assert claims.ordering({"t": other}, first="a", second="b", **options).verdict == FAILS


@pytest.mark.parametrize(("column", "by"), [("batch_size", []), ("horizon", ["horizon"])])
def test_the_length_of_a_run_is_that_of_its_network_and_batch_size(column: str, by: list[str]) -> None:
    small, large = (trained({"a": [0.4] * 3, "b": WHOLE}).assign(**{column: size}) for size in (8, 64))
    table = pd.concat([small.assign(step=8 * small["step"]), large], ignore_index=True)
    outcome = claims.ordering({"t": table}, first="a", second="b", column="val_loss", at_most=0.0, by=by)
    assert outcome.verdict == HOLDS
    assert "diverged" not in outcome.measured


@pytest.mark.parametrize("relation", ["difference", "ratio"])
def test_a_rate_that_diverged_on_a_seed_is_not_the_best_by_accuracy(relation) -> None:
    """At 1.0 two of three seeds reach 0.95, one diverges; at 0.1 all have 0.6."""
    safe = trained({"a": [0.6] * 3, "b": [0.7] * 3}, column="val_accuracy").assign(lr=0.1)
    wild = trained({"a": [0.95] * 3}, column="val_accuracy").assign(lr=1.0)
    wild.loc[(wild["seed"] == 0) & (wild["step"] == 20), "train_loss"] = math.nan
    options = {"column": "val_accuracy", "relation": relation, "tuned": "lr", "at_least": 0.0}
    outcome = claims.ordering({"t": pd.concat([safe, wild])}, first="a", second="b", **options)
    assert outcome.cases[0].estimate.value == pytest.approx(0.6 / 0.7 if relation == "ratio" else -0.1)


LOST = [math.nan] * 3
WHOLE = [0.5, 0.51, 0.52]


@pytest.mark.parametrize("statistic", ["last", "mean", "min", "sd_of_changes"])
@pytest.mark.parametrize("relation", ["difference", "ratio"])
@pytest.mark.parametrize(
    ("table", "said", "verdict"),
    [
        (trained({"a": LOST, "b": WHOLE}), "diverged", FAILS),
        (trained({"a": [math.inf] * 3, "b": WHOLE}), "diverged", FAILS),
        (trained({"a": WHOLE, "b": LOST}), "diverged", HOLDS),
        (trained({"a": LOST, "b": LOST}), "no number", INCONCLUSIVE),
        (trained({"a": WHOLE, "b": WHOLE}, train_loss=math.nan), "diverged", FAILS),
        (trained({"a": WHOLE, "b": WHOLE}).assign(status="finished"), "", HOLDS),
        (trained({"a": WHOLE, "b": WHOLE}, status="diverged"), "diverged", FAILS),
    ],
)
def test_a_run_that_diverged_is_worst_by_any_statistic(table, said, verdict, relation, statistic) -> None:
    bound = 0.0 if relation == "difference" else 1.0
    options = {"column": "val_loss", "statistic": statistic, "relation": relation, "at_most": bound}
    outcome = claims.ordering({"t": table}, first="a", second="b", **options)
    assert outcome.verdict == verdict
    assert said in outcome.measured


@pytest.mark.parametrize(("diverged", "verdict"), [("a", FAILS), ("b", HOLDS)])
@pytest.mark.parametrize("relation", ["difference", "ratio"])
def test_of_accuracies_a_run_that_diverged_has_the_least(diverged, verdict, relation) -> None:
    """A network of NaN weights still has an accuracy, that of one class."""
    table = trained({"a": WHOLE, "b": WHOLE}, column="val_accuracy")
    table.loc[(table["optimizer"] == diverged) & (table["step"] == 20), "train_loss"] = math.nan
    bound = 0.0 if relation == "difference" else 1.0
    options = {"column": "val_accuracy", "relation": relation, "at_least": bound}
    assert claims.ordering({"t": table}, first="a", second="b", **options).verdict == verdict


@pytest.mark.parametrize("relation", ["difference", "ratio"])
def test_where_both_sides_diverged_on_a_seed_neither_is_better(relation) -> None:
    table = trained({"a": [math.inf, 0.5, 0.4], "b": [math.inf, 0.6, 0.5]})
    equal = 0.0 if relation == "difference" else 1.0
    options = {"column": "val_loss", "relation": relation, "at_most": equal}
    outcome = claims.ordering({"t": table}, first="a", second="b", **options)
    assert (outcome.verdict, outcome.seeds) == (INCONCLUSIVE, 3)


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([2.0, 2.0], "2"),
        ([math.inf, math.inf], "first diverged"),
        ([1e19, 1e9], "first diverged"),
        ([0.0, 1e-30], "second diverged"),
        ([2.0, math.inf], "no ratio: on some seeds a side diverged"),
        ([1e5, 1e-5], "1 (no interval)"),
    ],
)
def test_a_ratio_with_a_diverged_side_is_said_in_words(ratios: list[float], text: str) -> None:
    assert str(claims.estimate_ratio(ratios)) == text
