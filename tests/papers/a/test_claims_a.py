"""The verdict rules of paper A on made-up tables, each of which can give every verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from papers.a import verdicts as claims_a
from papers.common.outcomes import FAILS, HOLDS, INCONCLUSIVE, Untested


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
