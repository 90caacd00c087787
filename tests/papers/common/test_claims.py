"""Verdict rules on made-up tables: each rule must be able to give every verdict, and give it for the right reason."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from papers.a import verdicts as claims_a
from papers.common import verdicts as claims
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Case, Estimate, Outcome, Untested, number
from papers.common.rows import STATISTICS

SEEDS = range(5)


def runs(values: dict[str, list[float]], column: str = "val_loss", **constants: object) -> pd.DataFrame:
    """One row a seed for each optimiser."""
    rows = [
        {"optimizer": name, "seed": seed, "step": 10, column: value, **constants}
        for name, results in values.items()
        for seed, value in enumerate(results)
    ]
    return pd.DataFrame(rows)


def test_estimate_is_the_t_interval() -> None:
    found = claims.estimate([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t quantile of 2 degrees of freedom, tabulated
    assert (found.value, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)


def test_one_seed_takes_the_declared_margin() -> None:
    assert claims.estimate([2.0], margin=0.5) == Estimate(2.0, 1.5, 2.5, 1)


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


@pytest.mark.parametrize("column", ["val_accuracy", "accuracy_percent_mean", "val_accuracy_mean"])
def test_of_every_accuracy_the_best_rate_is_that_of_the_largest(column: str) -> None:
    rates = ((0.1, {"a": [0.6] * 2, "b": [0.7] * 2}), (1.0, {"a": [0.8] * 2, "b": [0.3] * 2}))
    table = pd.concat([runs(values, column, lr=lr) for lr, values in rates])
    outcome = claims.ordering({"t": table}, first="a", second="b", column=column, tuned="lr", at_least=0.0)
    assert outcome.cases[0].estimate.value == pytest.approx(0.1)


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
    assert "network b: no number" in outcome.measured or "b: no number" in outcome.measured
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


def one_seed(fast: list[float], slow: list[float], per_epoch: int = 10) -> pd.DataFrame:
    """Two loss curves, evaluated at every step."""
    rows = [
        {"optimizer": name, "seed": 0, "batch_size": 64, "step": i, "epoch": i / per_epoch, "eval_train_loss": value}
        for name, curve in (("qn", fast), ("sgd", slow))
        for i, value in enumerate(curve)
    ]
    return pd.DataFrame(rows)


def test_crossover() -> None:
    def metrics(*curves: list[float]) -> pd.DataFrame:
        return pd.concat([one_seed(*curves).assign(seed=seed) for seed in range(40)])

    slow = np.linspace(2, 0.5, 21).tolist()
    overtaken = [2.0, 1.7, 1.6, *[1.55] * 18]
    found = claims_a.crossover({"t": metrics(overtaken, slow)}, fast="qn", slow="sgd")
    assert found.verdict == HOLDS
    half = metrics(overtaken, slow).assign(seed=lambda t: t["seed"] + 40)
    half = pd.concat([half, metrics(slow, overtaken)])
    assert claims_a.crossover({"t": half}, fast="qn", slow="sgd").verdict == FAILS  # in half of the seeds
    assert (
        claims_a.crossover({"t": metrics(overtaken, slow)}, fast="qn", slow="sgd", within_epochs=0.2).verdict == FAILS
    )
    assert claims_a.crossover({"t": metrics(slow, overtaken)}, fast="qn", slow="sgd").verdict == FAILS
    always_ahead = [0.9 * value for value in slow]
    assert claims_a.crossover({"t": metrics(always_ahead, slow)}, fast="qn", slow="sgd").verdict == FAILS
    assert claims_a.crossover({"t": one_seed(overtaken, slow)}, fast="qn", slow="sgd").verdict == INCONCLUSIVE
    assert claims_a.crossover({"t": one_seed(slow, overtaken)}, fast="qn", slow="sgd").verdict == INCONCLUSIVE


def test_a_batch_size_at_which_one_of_the_two_was_not_run_says_nothing() -> None:
    overtaken = [2.0, 1.7, 1.6, *[1.55] * 18]
    parts = [one_seed(overtaken, np.linspace(2, 0.5, 21).tolist()).assign(seed=seed) for seed in range(40)]
    both = pd.concat(parts)
    alone = both[both["optimizer"] == "qn"]
    with pytest.raises(Untested):
        claims_a.crossover({"t": alone}, fast="qn", slow="sgd")
    table = pd.concat([both, alone.assign(batch_size=512), alone.assign(seed=alone["seed"] + 40)])
    outcome = claims_a.crossover({"t": table}, fast="qn", slow="sgd")
    assert outcome.verdict == HOLDS
    assert [case.name for case in outcome.cases] == ["batch 64"]


def test_a_crossover_at_every_size_waits_for_the_full_batch() -> None:
    overtaken, slow = [2.0, 1.7, 1.6, *[1.55] * 18], np.linspace(2, 0.5, 21).tolist()
    table = pd.concat([one_seed(overtaken, slow).assign(seed=seed) for seed in range(40)])
    asked = {"fast": "qn", "slow": "sgd", "full_batch": True}
    outcome = claims_a.crossover({"t": table}, **asked)
    assert outcome.verdict == INCONCLUSIVE
    assert "full batch: no number (not run)" in outcome.measured
    full = table.assign(batch_size=640, epoch=table["step"])
    assert claims_a.crossover({"t": pd.concat([table, full])}, **asked).verdict == HOLDS
    never = pd.concat([one_seed(slow, overtaken).assign(seed=seed) for seed in range(40)])
    assert claims_a.crossover({"t": never}, **asked).verdict == FAILS


def test_gap_elsewhere() -> None:
    smooth = pd.DataFrame({"eigenvalue": [100.0, *(10.0 * 0.9**i for i in range(29))]})
    cut = pd.DataFrame({"eigenvalue": [*(10.0 - 0.1 * i for i in range(10)), *(0.5 - 0.01 * i for i in range(20))]})
    assert claims_a.gap_elsewhere({"t": smooth}, at=10, top=30).verdict == HOLDS
    assert claims_a.gap_elsewhere({"t": cut}, at=10, top=30).verdict == FAILS
    with pytest.raises(Untested, match="positive"):
        claims_a.gap_elsewhere({"t": cut.assign(eigenvalue=cut["eigenvalue"] - 9.15)}, at=10, top=30)
    with pytest.raises(Untested, match="only 29 eigenvalues"):
        claims_a.gap_elsewhere({"t": cut.head(29)}, at=10, top=30)
    with pytest.raises(Untested, match="converged"):
        claims_a.gap_elsewhere({"t": smooth.assign(converged=False)}, at=10, top=30)
    deep = pd.DataFrame({"eigenvalue": [*cut["eigenvalue"], 1e-9, 1e-12]})  # what lies below the top 30 has no say
    assert claims_a.gap_elsewhere({"t": deep}, at=10, top=30).verdict == FAILS


def ranks(values: list[int], null: int) -> pd.DataFrame:
    steps = range(len(values))
    return pd.DataFrame(
        {"seed": 0, "quantity": "rank", "tolerance": 0.1, "step": steps, "value": values, "null": null, "classes": 10}
    )


def test_rank_falls() -> None:
    assert claims_a.rank_falls({"t": ranks([20, 14, 10, 10, 11, 10], 21)}).verdict == HOLDS
    assert claims_a.rank_falls({"t": ranks([21, 21, 21, 20, 21, 20], 21)}).verdict == FAILS
    # a tolerance at which random vectors lose rank too says nothing
    assert claims_a.rank_falls({"t": ranks([20, 14, 10, 10, 11, 10], 12)}).verdict == FAILS


def test_a_rank_far_below_the_number_of_classes_is_not_near_it() -> None:
    """At a high tolerance class gradients that are nearly parallel count as one."""
    assert claims_a.rank_falls({"t": ranks([20, 12, 3, 3, 3, 3], 21)}).verdict == FAILS
    assert claims_a.rank_falls({"t": ranks([20, 12, 9, 9, 9, 9], 21)}).verdict == HOLDS


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


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (12345.0, "12,300"), (1234567.0, "1,230,000"), (math.inf, "diverged")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
