"""Paper C's verdict rules on made-up tables that must give each verdict."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from papers import registry
from papers.c import verdicts as claims_c
from papers.common import ledger
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Untested

CELL = {"where": {"solver": "SGD"}, "mean": "mean", "sd": "sd", "count": "solved", "runs": "runs", "least": 90}


def cell(mean: float, sd: float, solved: int, runs: int = 100) -> claims_c.Outcome:
    table = pd.DataFrame({"solver": ["SGD"], "mean": [mean], "sd": [sd], "solved": [solved], "runs": [runs]})
    return claims_c.cell({"t": table}, reference=370, reference_sd=40, **CELL)


@pytest.mark.parametrize(
    ("mean", "sd", "solved", "verdict"),
    [
        (380.0, 40.0, 100, HOLDS),
        (500.0, 40.0, 100, FAILS),
        (408.0, 40.0, 100, INCONCLUSIVE),
        (380.0, 40.0, 50, INCONCLUSIVE),  # half of the runs never got there
        (200.0, 40.0, 50, INCONCLUSIVE),  # with the late ones the mean may be the paper's
        (500.0, 40.0, 50, FAILS),  # with them it is farther above
        (math.nan, math.nan, 0, INCONCLUSIVE),
    ],
)
def test_cell(mean: float, sd: float, solved: int, verdict: str) -> None:
    outcome = cell(mean, sd, solved)
    assert (outcome.verdict, outcome.seeds) == (verdict, solved)


def test_of_many_runs_as_large_a_part_must_get_there() -> None:
    assert cell(380.0, 40.0, 3900, runs=4000).verdict == HOLDS
    assert cell(380.0, 40.0, 2000, runs=4000).verdict == INCONCLUSIVE


def test_table_2_is_judged_by_its_networks_on_cifar10() -> None:
    (claim,) = [one for one in ledger.load([registry.claim_files()["c"]]) if one.id == "C22"]
    error = {"train_error_percent": 14.0, "val_error_percent": 20.0}
    paper = {"paper_train_error_percent": 14.1, "paper_val_error_percent": 19.9}
    rows = [{"network": name, "optimizer": "curveball", "seeds": 1, **error, **paper} for name in ("basic", "vgg-f")]
    rows[1] |= {"train_error_percent": 50.0}
    outcome = ledger.rule_of(claim.rule)({"errors": pd.DataFrame(rows)}, **claim.options)
    assert [case.name for case in outcome.cases] == [f"basic, curveball {column}" for column in error]
    assert outcome.verdict == HOLDS


def test_cell_of_few_runs_is_no_test() -> None:
    with pytest.raises(Untested, match="20 of 20 runs"):
        cell(380.0, 40.0, 20, runs=20)


def curves(**errors: list[list[float]]) -> pd.DataFrame:
    """Accuracy by epoch for each optimiser and seed; an epoch takes 1 s, one of curveball's 2 s."""
    rows = [
        {"dataset": "d", "model": "m", "optimizer": name, "batch_size": 8, "lr": 0.1, "seed": seed, "step": 10 * epoch}
        | {"epoch": epoch, "wall_s": epoch * (2.0 if name == "curveball" else 1.0)}
        | {"accuracy": 1 - error, "eval_train_loss": 3 * error}
        for name, seeds in errors.items()
        for seed, curve in enumerate(seeds)
        for epoch, error in enumerate(curve)
    ]
    return pd.DataFrame(rows)


SGD = [[0.9, 0.6, 0.5, 0.4], [0.9, 0.61, 0.51, 0.41]]


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ([[0.9, 0.5, 0.4, 0.3]] * 2, HOLDS),
        ([[0.9, 0.7, 0.6, 0.5]] * 2, FAILS),
        ([[0.9, 0.5, 0.4, 0.3], [0.9, 0.5, 0.6, 0.3]], INCONCLUSIVE),
        ([[0.9, 0.5]] * 2, FAILS),  # diverged in the second epoch
    ],
)
def test_at_every_epoch(own: list[list[float]], verdict: str) -> None:
    table = curves(curveball=own, sgd=SGD)
    assert (
        claims_c.at_every_epoch({"t": table}, first="curveball", second=["sgd"], column="accuracy").verdict == verdict
    )


@pytest.mark.parametrize(("epochs_lost", "verdict"), [(0, INCONCLUSIVE), (1, INCONCLUSIVE), (3, FAILS)])
def test_at_every_epoch_of_one_seed_fails_by_more_than_the_margin_only(epochs_lost: int, verdict: str) -> None:
    sgd = [0.9, *[0.5] * 20]
    own = [0.9, *[0.6] * epochs_lost, *[0.4] * (20 - epochs_lost)]
    outcome = claims_c.at_every_epoch(
        {"t": curves(curveball=[own], sgd=[sgd])}, first="curveball", second=["sgd"], column="accuracy", margin=0.1
    )
    assert outcome.verdict == verdict


def test_at_every_epoch_counts_the_epoch_in_which_it_diverged_as_lost() -> None:
    table = curves(curveball=[[0.9, 0.5, 0.4, 0.95]] * 2, sgd=SGD).astype({"epoch": float})
    lost = (table["optimizer"] == "curveball") & (table["epoch"] == 3)
    table.loc[lost, ["step", "epoch"]] = [24, 2.4]
    outcome = claims_c.at_every_epoch({"t": table}, first="curveball", second=["sgd"], column="accuracy")
    assert outcome.cases[0].estimate.value == pytest.approx(2 / 3)
    assert outcome.verdict == FAILS


def test_at_every_epoch_takes_the_rivals_best_rate() -> None:
    weak = curves(sgd=[[0.9, 0.9, 0.9, 0.9]] * 2).assign(lr=10.0)
    table = pd.concat([curves(curveball=[[0.9, 0.7, 0.6, 0.5]] * 2, sgd=SGD), weak])
    assert claims_c.at_every_epoch({"t": table}, first="curveball", second=["sgd"], column="accuracy").verdict == FAILS


def test_at_every_epoch_without_a_rival_is_untested() -> None:
    with pytest.raises(Untested):
        claims_c.at_every_epoch({"t": curves(curveball=SGD)}, first="curveball", second=["sgd"], column="accuracy")


@pytest.mark.parametrize(
    ("own", "verdict", "value"),
    [
        ([[0.9, 0.3, 0.2, 0.1]] * 2, HOLDS, 0.25 / 0.405),  # after 3 s curveball stands between epochs 1 and 2
        ([[0.9, 0.8, 0.7, 0.6]] * 2, FAILS, 0.75 / 0.405),
    ],
)
def test_at_equal_seconds(own: list[list[float]], verdict: str, value: float) -> None:
    table = curves(curveball=own, sgd=SGD)
    options = {"first": "curveball", "second": ["sgd", "adam"], "column": "accuracy", "at_most": 1.1}
    outcome = claims_c.at_equal_seconds({"t": table}, **options)
    assert outcome.verdict == verdict
    assert outcome.cases[0].estimate.value == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", ["curveball", "sgd"])
def test_at_equal_seconds_a_run_that_diverged_has_not_finished_and_is_worst(name: str) -> None:
    lost = {name: [[0.9, 0.3, 0.2, 0.1], [0.9, 0.95], [0.9, 0.3, 0.2, 0.1]]}
    table = curves(**{"curveball": [[0.9, 0.3, 0.2, 0.1]] * 3, "sgd": [[0.9, 0.6, 0.5, 0.4]] * 3, **lost})
    options = {"first": "curveball", "second": ["sgd"], "column": "accuracy", "at_most": 1.1}
    case = claims_c.at_equal_seconds({"t": table}, **options).cases[0]
    assert case.note == "after 3 s"
    assert case.verdict == INCONCLUSIVE
    assert case.estimate.high == (math.inf if name == "curveball" else pytest.approx(0.25 / 0.1))


def test_at_equal_seconds_with_spread_over_seeds() -> None:
    table = curves(curveball=[[0.9, 0.3, 0.2, 0.1], [0.9, 0.8, 0.7, 0.6]], sgd=SGD)
    options = {"first": "curveball", "second": ["sgd"], "column": "accuracy", "at_most": 1.1}
    assert claims_c.at_equal_seconds({"t": table}, **options).verdict == INCONCLUSIVE


def settings(*finals: list[float]) -> pd.DataFrame:
    """Final losses by seed for each initial damping."""
    rows = [
        {"optimizer": f"curveball-{i}", "damping": 10.0**i, "seed": seed, "step": step, "loss": loss if step else 2.3}
        for i, losses in enumerate(finals)
        for seed, loss in enumerate(losses)
        for step in (0, 100)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        (settings([1.0, 1.0], [1.1, 1.1]), HOLDS),
        (settings([1.0, 1.0], [2.0, 2.0]), FAILS),
        (settings([1.0, 1.0, 1.0], [1.0, 1.5, 1.2]), INCONCLUSIVE),
        (settings([1.0, 1.0], [math.inf, math.inf]), FAILS),
        (settings([1.0, 1.0], [math.nan, math.nan]), FAILS),
        (settings([1.0, math.nan], [1.0, math.nan]), INCONCLUSIVE),
    ],
)
def test_insensitive(table: pd.DataFrame, verdict: str) -> None:
    outcome = claims_c.insensitive({"t": table}, column="loss", key="damping", at_most=1.25)
    assert outcome.verdict == verdict


def test_insensitive_needs_two_settings() -> None:
    with pytest.raises(Untested, match="two values"):
        claims_c.insensitive({"t": settings([1.0])}, column="loss", key="damping", at_most=1.25)
