"""Verdict rules on made-up tables: each rule must be able to give every verdict, and give it for the right reason."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from papers.common import verdicts as claims
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Case, Estimate, Outcome, Untested, number
from papers.common.rows import STATISTICS
from tests.papers.common.made_up import runs


def test_estimate_is_the_t_interval() -> None:
    found = claims.estimate([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t quantile of 2 degrees of freedom, tabulated
    assert (found.value, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)


def test_one_seed_takes_the_declared_margin() -> None:
    assert claims.estimate([2.0], margin=0.5) == Estimate(2.0, 1.5, 2.5, 1)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = [e.low <= 1.0 <= e.high for e in (claims.estimate(generator.normal(1, 2, 4)) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.5, 0.9, HOLDS), (1.2, 1.5, FAILS), (0.9, 1.1, INCONCLUSIVE), (-0.5, -0.1, FAILS), (0.0, 1.0, HOLDS)],
)
def test_judge(low: float, high: float, verdict: str) -> None:
    assert claims.judge(Estimate((low + high) / 2, low, high, 3), at_least=0.0, at_most=1.0) == verdict


def test_judge_wants_a_range_and_a_number() -> None:
    with pytest.raises(ValueError, match="at_least"):
        claims.judge(Estimate(1.0, 1.0, 1.0, 1))
    assert claims.judge(claims.estimate([]), at_least=0.0) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [((HOLDS, HOLDS), HOLDS), ((HOLDS, FAILS), FAILS), ((HOLDS, INCONCLUSIVE), INCONCLUSIVE)],
)
def test_a_claim_on_several_networks(verdicts: tuple[str, ...], expected: str) -> None:
    outcome = Outcome(tuple(Case(str(i), claims.estimate([float(i)]), v) for i, v in enumerate(verdicts)))
    assert outcome.verdict == expected
    assert outcome.deciding.verdict == expected


def test_no_case_is_untested() -> None:
    with pytest.raises(Untested):
        Outcome(())


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.95, 0.96, 0.94, 0.95, 0.95], HOLDS),
        ([0.5, 0.52, 0.48, 0.5, 0.5], FAILS),
        ([0.99, 0.7, 0.95, 0.85, 0.99], INCONCLUSIVE),
    ],
)
def test_threshold(values: list[float], verdict: str) -> None:
    tables = {"t": runs({"sgd": values}, "value")}
    assert claims.threshold(tables, at_least=0.9).verdict == verdict


@pytest.mark.parametrize(("value", "verdict"), [(0.4, HOLDS), (0.5, FAILS), (0.45, INCONCLUSIVE)])
def test_a_range_can_be_a_number_and_its_tolerance(value: float, verdict: str) -> None:
    table = pd.DataFrame({"value": [value]})
    outcome = claims.threshold({"t": table}, around=0.36, tolerance=0.1, margin=0.02)
    assert outcome.verdict == verdict


def test_threshold_never_mixes_runs_of_different_settings() -> None:
    mixed = pd.concat([runs({"sgd": [1.0]}, "value", lr=0.1), runs({"sgd": [3.0]}, "value", lr=0.2)])
    outcome = claims.threshold({"t": mixed}, at_least=2.0, margin=0.1)
    assert [(c.name, c.estimate.value) for c in outcome.cases] == [("lr 0.1", 1.0), ("lr 0.2", 3.0)]
    assert outcome.verdict == FAILS


def test_a_count_must_be_exact() -> None:
    exact = {"at_least": 9.5, "at_most": 10.5}
    assert claims.threshold({"t": runs({"s": [10, 10]}, "value")}, **exact).verdict == HOLDS
    assert claims.threshold({"t": runs({"s": [9, 9]}, "value")}, **exact).verdict == FAILS
    assert claims.threshold({"t": runs({"s": [9, 10, 11]}, "value")}, **exact).verdict == INCONCLUSIVE


def test_statistics_follow_the_steps_not_the_rows() -> None:
    table = pd.DataFrame({"seed": 0, "step": [2, 0, 1], "value": [5.0, 1.0, 3.0]})
    picked = {s: claims.threshold({"t": table}, statistic=s, at_least=0).cases[0].estimate.value for s in STATISTICS}
    assert (picked["first"], picked["last"], picked["late_mean"]) == (1.0, 5.0, 4.0)
    assert picked["sd_of_changes"] == 0.0


@pytest.mark.parametrize(
    ("newton", "verdict"),
    [([0.8, 0.9, 0.85], HOLDS), ([1.2, 1.3, 1.25], FAILS), ([0.9, 1.2, 0.95], INCONCLUSIVE)],
)
@pytest.mark.parametrize("relation", ["difference", "ratio"])
def test_ordering(newton: list[float], verdict: str, relation: str) -> None:
    tables = {"t": runs({"newton": newton, "sgd": [1.0, 1.1, 1.05]})}
    bound = 0.0 if relation == "difference" else 1.0
    outcome = claims.ordering(tables, first="newton", second="sgd", column="val_loss", relation=relation, at_most=bound)
    assert outcome.verdict == verdict


def test_ordering_pairs_the_seeds() -> None:
    """A constant gap under a large spread between seeds is certain only when paired."""
    tables = {"t": runs({"a": [1.0, 5.0, 9.0], "b": [1.1, 5.1, 9.1]})}
    outcome = claims.ordering(tables, first="a", second="b", column="val_loss", at_most=0.0)
    assert outcome.verdict == HOLDS
    assert outcome.cases[0].estimate.value == pytest.approx(-0.1)


def test_ordering_tunes_each_side() -> None:
    table = pd.concat(
        [
            runs({"a": [1.0, 1.1], "b": [3.0, 3.0]}, lr=0.1),
            runs({"a": [9.0, 9.0], "b": [2.0, 2.1]}, lr=1.0),
        ]
    )
    outcome = claims.ordering(
        {"t": table}, first="a", second="b", column="val_loss", tuned="lr", relation="ratio", at_most=0.9
    )
    assert outcome.cases[0].estimate.value == pytest.approx(math.sqrt(1.0 / 2.0 * 1.1 / 2.1))
    assert outcome.verdict == HOLDS


@pytest.mark.parametrize("column", ["val_accuracy", "accuracy_percent_mean", "val_accuracy_mean"])
def test_of_every_accuracy_the_best_rate_is_that_of_the_largest(column: str) -> None:
    rates = ((0.1, {"a": [0.6] * 2, "b": [0.7] * 2}), (1.0, {"a": [0.8] * 2, "b": [0.3] * 2}))
    table = pd.concat([runs(values, column, lr=lr) for lr, values in rates])
    outcome = claims.ordering({"t": table}, first="a", second="b", column=column, tuned="lr", at_least=0.0)
    assert outcome.cases[0].estimate.value == pytest.approx(0.1)


def test_ordering_without_the_other_side_is_untested() -> None:
    with pytest.raises(Untested):
        claims.ordering({"t": runs({"a": [1.0]})}, first="a", second="b", column="val_loss", at_most=0.0)


@pytest.mark.parametrize(("above", "verdict"), [(38, HOLDS), (5, FAILS), (22, INCONCLUSIVE)])
def test_share(above: int, verdict: str) -> None:
    table = pd.DataFrame({"fit": [1.0] * above + [0.0] * (40 - above), "eigenvalue": 0.5})
    assert claims.share({"t": table}, column="fit", above="eigenvalue", at_least=0.5).verdict == verdict
    assert claims.share({"t": table}, column="fit", above=0.5, at_least=0.5).verdict == verdict


@pytest.mark.parametrize("above", ["eigenvalue", 0.5])
def test_a_share_is_of_the_rows_that_can_be_compared(above: str | float) -> None:
    table = pd.DataFrame({"fit": [1.0] * 9 + [math.nan], "eigenvalue": 0.5})
    lost = table.assign(eigenvalue=[math.nan] * 4 + [0.5] * 6)
    outcome = claims.share({"t": lost}, column="fit", above=above, at_least=0.5)
    compared = 5 if above == "eigenvalue" else 9
    assert (outcome.cases[0].estimate.value, outcome.cases[0].note) == (1.0, f"{compared} rows")


def test_a_correlation_says_of_how_many_rows_it_is() -> None:
    table = pd.DataFrame({"x": range(12), "y": [math.nan, math.inf, *range(10)]})
    assert claims.rank_correlation({"t": table}, x="x", y="y", at_least=0.5).cases[0].note == "10 rows"


def test_a_threshold_for_each_of_several_waits_for_all_of_them() -> None:
    table = runs({"a": [1.0, 1.0], "b": [1.0, 1.0]}, "value")
    asked = {"at_least": 0.5, "by": ["optimizer"], "where": {"optimizer": ["a", "b"]}, "every": "optimizer"}
    assert claims.threshold({"t": table}, **asked).verdict == HOLDS
    with pytest.raises(Untested, match="no row with optimizer b"):
        claims.threshold({"t": table[table["optimizer"] == "a"]}, **asked)


def test_a_value_that_is_missing_keeps_a_claim_on_several_open() -> None:
    table = pd.DataFrame({"network": ["a", "b"], "value": [1.0, math.nan], "paper": [1.0, 2.0]})
    options = {"column": "value", "reference": "paper", "tolerance": 0.5, "by": ["network"], "margin": 0.1}
    outcome = claims.against_reference({"t": table}, **options)
    assert outcome.verdict == INCONCLUSIVE
    assert "b: no number" in outcome.measured
    assert claims.against_reference({"t": table[:1]}, **options).verdict == HOLDS


def test_wilson_interval_against_its_closed_form() -> None:
    found = claims.proportion(8, 10, 1)
    z, n, p = 1.959963984540054, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize(("noise", "verdict"), [(0.01, HOLDS), (1e6, FAILS), (0.55, INCONCLUSIVE)])
def test_rank_correlation(noise: float, verdict: str) -> None:
    generator = np.random.default_rng(1)
    x = np.linspace(0, 1, 60)
    table = pd.DataFrame({"x": x, "y": x + noise * generator.standard_normal(60)})
    assert claims.rank_correlation({"t": table}, x="x", y="y", at_least=0.5).verdict == verdict


def test_rank_correlation_of_too_few_rows_is_inconclusive() -> None:
    table = pd.DataFrame({"x": [1, 2, 3], "y": [1, 2, 3]})
    assert claims.rank_correlation({"t": table}, x="x", y="y", at_least=0.5).verdict == INCONCLUSIVE


def test_pick_conditions() -> None:
    table = pd.DataFrame({"lr": [0.1, 0.2, 0.5], "name": ["a", "b", "c"]})
    assert claims.pick({"t": table}, where={"lr": {"above": 0.1, "below": 0.5}})["name"].tolist() == ["b"]
    assert claims.pick({"t": table}, where={"name": ["a", "c"]})["lr"].tolist() == [0.1, 0.5]
    with pytest.raises(Untested, match="no row with lr"):
        claims.pick({"t": table}, where={"lr": 7})
    with pytest.raises(Untested, match="no column"):
        claims.pick({"t": table}, where={"nothing": 7})
    with pytest.raises(ValueError, match="name one of"):
        claims.pick({"t": table, "u": table})


def test_per_step() -> None:
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "step": [1, 10, 1, 10], "backward": [2, 20, 2, 20]})
    assert claims.per_step({"t": table}, column="backward", at_least=10).verdict == FAILS
    assert claims.per_step({"t": table}, column="backward", at_most=2).verdict == HOLDS


def test_rules_do_not_import_torch() -> None:
    code = "import sys, papers.cli.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("margin", "verdict"), [(0.0, INCONCLUSIVE), (0.05, HOLDS)])
def test_one_seed_has_a_verdict_by_a_declared_margin_only(margin: float, verdict: str) -> None:
    """For each general rule: the same single run, far inside the allowed range."""
    table = pd.DataFrame({"optimizer": ["a", "b"], "seed": 0, "step": 10, "value": [10.0, 1.0], "paper": [10.1, 1.1]})
    first = {"t": table[table["optimizer"] == "a"]}
    rules = [
        claims.threshold(first, at_least=5, margin=margin),
        claims.per_step(first, column="value", at_most=5, margin=margin),
        claims.ordering({"t": table}, first="a", second="b", column="value", at_least=5, margin=margin),
        claims.ordering(
            {"t": table}, first="a", second="b", column="value", relation="ratio", at_least=5, margin=margin
        ),
        claims.against_reference(
            {"t": table}, column="value", reference="paper", tolerance=0.5, by=["optimizer"], margin=margin
        ),
    ]
    assert [outcome.verdict for outcome in rules] == [verdict] * len(rules)
    assert ("(no interval)" in rules[0].measured) == (not margin)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (12345.0, "12,300"), (1234567.0, "1,230,000"), (math.inf, "diverged")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
