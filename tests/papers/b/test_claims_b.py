"""Paper B's verdict rules on made-up tables that must give each verdict."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from papers.b import verdicts as claims_b
from papers.common import verdicts
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Untested


def overlaps(top: float, following: float, spread: float = 0.0) -> pd.DataFrame:
    rows = [
        {"seed": seed, "start_step": 100, "step": 200, "index": 10, "quantity": name, "value": value + spread * seed}
        for seed in (-1, 0, 1)
        for name, value in (("top_overlap", top), ("next_overlap", following))
    ]
    return pd.DataFrame(rows)


PRESERVED = {"classes": 10, "from_step": 100, "top_at_least": 0.5, "next_share_at_most": 0.5}


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        (overlaps(0.8, 0.1), HOLDS),
        (overlaps(0.3, 0.1), FAILS),
        (overlaps(0.8, 0.7), FAILS),
        (overlaps(0.55, 0.1, spread=0.1), INCONCLUSIVE),
    ],
)
def test_preserved(table: pd.DataFrame, verdict: str) -> None:
    assert claims_b.preserved({"t": table}, **PRESERVED).verdict == verdict


def test_preserved_needs_a_late_start() -> None:
    with pytest.raises(Untested):
        claims_b.preserved({"t": overlaps(0.8, 0.1)}, **{**PRESERVED, "from_step": 500})


def bent(at: int, seed: int = 0) -> pd.DataFrame:
    x = np.arange(2, 21)
    noise = 0.002 * np.random.default_rng(seed).standard_normal(len(x))
    return pd.DataFrame({"seed": seed, "dimension": x, "value": 0.8 - 0.03 * np.maximum(x - at, 0) + noise})


def test_kink() -> None:
    assert claims_b.kink({"t": bent(9)}, at=9, margin=0.4).verdict == HOLDS
    assert claims_b.kink({"t": bent(15)}, at=9, margin=0.4).verdict == FAILS
    mixed = pd.concat([bent(5, 0), bent(9, 1), bent(14, 2)])
    assert claims_b.kink({"t": mixed}, at=9).verdict == INCONCLUSIVE
    with pytest.raises(Untested):
        claims_b.kink({"t": bent(9).head(4)}, at=9)


def test_break_point_of_an_exact_bend() -> None:
    x = np.arange(2.0, 21.0)
    assert claims_b.break_point(x, 0.5 + 0.01 * x - 0.04 * np.maximum(x - 12, 0)) == 12


def test_against_reference() -> None:
    table = pd.DataFrame({"labels": ["true", "even/odd", "other"], "outliers": [10, 2, 7], "paper": [10, 2, np.nan]})
    options = {"column": "outliers", "reference": "paper", "tolerance": 0.5, "by": ["labels"], "margin": 0.4}
    assert verdicts.against_reference({"t": table}, **options).verdict == HOLDS
    assert len(verdicts.against_reference({"t": table}, **options).cases) == 2
    assert verdicts.against_reference({"t": table.assign(outliers=[9, 2, 7])}, **options).verdict == FAILS
    one = {**options, "by": [], "where": {"labels": "other"}}
    assert verdicts.against_reference({"t": table.assign(paper=7)}, **one).verdict == HOLDS
    assert verdicts.against_reference({"t": table.assign(paper=9)}, **one).verdict == FAILS
    seeds = pd.DataFrame({"labels": "true", "outliers": [9, 10, 11], "paper": 10})
    assert verdicts.against_reference({"t": seeds}, **options).verdict == INCONCLUSIVE


def test_against_several_references() -> None:
    table = pd.DataFrame({"network": ["a", "b"], "train": [14.0, 7.0], "val": [20.0, 16.0]})
    table = table.assign(paper_train=[14.1, 7.6], paper_val=[19.9, np.nan])
    options = {"column": ["train", "val"], "reference": ["paper_train", "paper_val"], "by": ["network"], "margin": 0.05}
    outcome = verdicts.against_reference({"t": table}, tolerance=1.5, **options)
    assert [case.name for case in outcome.cases] == ["a train", "b train", "a val"]
    assert outcome.verdict == HOLDS
    assert verdicts.against_reference({"t": table}, tolerance=0.2, **options).verdict == FAILS


def edge(dip: float, seeds: int = 4, noise: float = 0.001) -> pd.DataFrame:
    """Log eigenvalues that fall by 0.02 each, and by ``dip`` times as much after number 20."""
    generator = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        spacing = np.full(40, 0.02)
        spacing[19] *= dip
        logs = -np.cumsum(spacing) + noise * generator.standard_normal(40)
        rows.append(pd.DataFrame({"seed": seed, "index": range(1, 41), "eigenvalue": np.exp(logs)}))
    return pd.concat(rows)


def test_underdensity() -> None:
    assert claims_b.underdensity({"t": edge(4.0)}, at=20, at_least=1.2).verdict == HOLDS
    assert claims_b.underdensity({"t": edge(1.0)}, at=20, at_least=1.2).verdict == FAILS
    assert claims_b.underdensity({"t": edge(1.2, noise=0.01)}, at=20, at_least=1.2).verdict == INCONCLUSIVE
    with pytest.raises(Untested, match="up to number 131"):
        claims_b.underdensity({"t": edge(4.0)}, at=100, at_least=1.2)


def test_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = np.array([[1.0], [2.0], [4.0]])
    found = claims_b.jackknife(values, lambda x: float(x.mean()))
    expected = claims_b.estimate([1.0, 2.0, 4.0])
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def eigenvalues(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"seed": 0, "step": range(len(values)), "quantity": "eigenvalue", "index": 1, "value": values})


def test_rise_and_fall() -> None:
    options = {"rise": 1.5, "fall": 0.7, "margin": 0.05}
    assert claims_b.rise_and_fall({"t": eigenvalues([1, 3, 4, 2])}, **options).verdict == HOLDS
    assert claims_b.rise_and_fall({"t": eigenvalues([1, 3, 4, 4])}, **options).verdict == FAILS
    assert claims_b.rise_and_fall({"t": eigenvalues([1, 1.52, 1.0])}, **options).verdict == INCONCLUSIVE


def toy(eigenvalue: float, rank: int = 2, f_top: float = 1.0) -> pd.DataFrame:
    time = 1000.0
    rows = [
        ("eigenvalue", 1, eigenvalue, 1 / time),
        ("rank", 0, rank, 2),
        ("f_top", 0, f_top, 1.0),
        ("loss", 0, 1, None),
    ]
    table = pd.DataFrame(rows, columns=["quantity", "index", "value", "expected"]).assign(classes=2, time=time)
    table["relative_error"] = table["value"] / table["expected"] - 1
    table["time_times_value"] = time * table["value"]
    return table


def test_toy_exact() -> None:
    assert claims_b.toy_exact({"t": toy(0.001)}).verdict == HOLDS
    assert claims_b.toy_exact({"t": toy(0.00102)}).verdict == FAILS
    assert claims_b.toy_exact({"t": toy(0.001, rank=3)}).verdict == FAILS
    assert claims_b.toy_exact({"t": toy(0.001, f_top=0.99)}).verdict == FAILS
    with pytest.raises(Untested):
        claims_b.toy_exact({"t": toy(0.001).assign(classes=3)})


def learning(bulk: list[float], dominant: list[float]) -> pd.DataFrame:
    rows = [
        {"optimizer": name, "seed": seed, "step": step, "loss": value if step else 2.3}
        for name, values in (("sgd", [0.1, 0.11, 0.12]), ("bulk", bulk), ("dominant", dominant))
        for seed, value in enumerate(values)
        for step in (0, 50)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("bulk", "dominant", "verdict"),
    [
        ([0.1, 0.11, 0.12], [0.9, 1.0, 1.1], HOLDS),
        ([0.1, 0.11, 0.12], [0.1, 0.11, 0.12], FAILS),
        ([0.9, 1.0, 1.1], [0.9, 1.0, 1.1], FAILS),
        ([0.1, 0.11, 0.12], [0.1, 0.3, 0.9], INCONCLUSIVE),
        ([math.nan] * 3, [0.9, 1.0, 1.1], FAILS),
        ([0.1, 0.11, math.nan], [0.9, 1.0, 1.1], INCONCLUSIVE),
        ([0.1, 0.11, 0.12], [math.nan] * 3, HOLDS),
    ],
)
def test_dominant_and_bulk(bulk: list[float], dominant: list[float], verdict: str) -> None:
    outcome = claims_b.dominant_and_bulk(
        {"t": learning(bulk, dominant)},
        full="sgd",
        dominant="dominant",
        bulk="bulk",
        column="loss",
        as_well=1.25,
        stalls=2.0,
    )
    assert outcome.verdict == verdict


def test_dominant_and_bulk_needs_all_three() -> None:
    table = learning([0.1] * 3, [0.1] * 3)
    with pytest.raises(Untested, match="no run of bulk"):
        claims_b.dominant_and_bulk(
            {"t": table[table["optimizer"] != "bulk"]},
            full="sgd",
            dominant="dominant",
            bulk="bulk",
            column="loss",
            as_well=1.25,
            stalls=2.0,
        )


def test_random_spacings_are_no_dip() -> None:
    """Independent exponential spacings, alike everywhere: the widest of 21 means over seeds is above their median."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(20):
        logs = -np.cumsum(generator.exponential(0.02, (20, 140)), axis=1)
        rows = [
            pd.DataFrame({"seed": seed, "index": range(1, 141), "eigenvalue": np.exp(one)})
            for seed, one in enumerate(logs)
        ]
        found.append(claims_b.underdensity({"t": pd.concat(rows)}, at=100, at_least=1.2))
    assert np.mean([outcome.cases[0].estimate.value for outcome in found]) < 1.05
    assert not any(outcome.verdict == HOLDS for outcome in found)
