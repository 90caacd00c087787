"""The choice of a learning rate, which all tables, figures and verdicts share."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from papers.common.runs import best_rates
from papers.common.verdicts import ordering

RESULTS = pd.DataFrame(
    [("sgd", 0.1, 3.0), ("sgd", 0.1, 1.0), ("sgd", 1.0, 0.5), ("sgd", 1.0, math.nan), ("adam", 0.1, 7.0)],
    columns=["optimizer", "lr", "loss"],
)


def test_the_best_rate_is_that_of_the_best_mean_over_seeds() -> None:
    table = RESULTS.dropna()
    chosen = best_rates(table, ["optimizer"], "loss").set_index("optimizer")
    assert chosen["lr"].to_dict() == {"sgd": 1.0, "adam": 0.1}
    worst = best_rates(table, ["optimizer"], "loss", lower_is_better=False).set_index("optimizer")
    assert worst.loc["sgd"].tolist() == [0.1, 2.0]


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_one_diverged_seed_puts_its_rate_last_whichever_way_it_is_written(diverged: float) -> None:
    table = RESULTS.fillna(diverged)
    assert best_rates(table, ["optimizer"], "loss").set_index("optimizer").loc["sgd"].tolist() == [0.1, 2.0]


def test_a_group_that_diverged_everywhere_stays_with_its_first_rate_and_the_worst_score() -> None:
    table = pd.DataFrame({"optimizer": "sgd", "lr": [0.5, 0.1], "loss": [math.nan, math.inf]})
    assert best_rates(table, ["optimizer"], "loss")[["lr", "loss"]].values.tolist() == [[0.5, math.inf]]


def test_a_verdict_takes_the_rate_that_came_through_on_all_seeds() -> None:
    """An infinite accuracy is no best one: the rate diverged."""
    rows = [
        {"optimizer": name, "lr": lr, "seed": seed, "step": 1, "score": score}
        for name, lr, scores in [("a", 0.1, [2.0, 2.0]), ("a", 1.0, [9.0, math.inf]), ("b", 0.1, [1.0, 1.0])]
        for seed, score in enumerate(scores)
    ]
    outcome = ordering(
        {"t": pd.DataFrame(rows)}, first="a", second="b", column="score", tuned="lr", lower_is_better=False, at_least=0
    )
    assert outcome.deciding.estimate.value == 1.0
