"""A-R: verdicts on readings whose curves are made so that the answer is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pandas as pd
import pytest

from curvspace.optim import class_gradient_newton
from papers import registry
from papers.a.figures_readings import curves_by_reading
from papers.a.readings import judgements, readings_by_statement, score, summary
from papers.a.verdicts import best_reading
from papers.common.style import Style

PAIRS = {"sgd": ["good", "diverging"]}
STEPS = range(0, 101, 5)


def run(optimizer: str, lr: float, seed: int, loss: Callable[[int], float], accuracy: float) -> list[dict]:
    """One run; it ends where its loss is not finite. Between evaluations there is a row without one."""
    rows = []
    for step in STEPS:
        value = loss(step)
        known = {"val_loss": value, "val_accuracy": accuracy, "eval_train_loss": value}
        rows.append({"optimizer": optimizer, "lr": lr, "seed": seed, "step": step, "epoch": step / 50, **known})
        if not math.isfinite(value) or step == STEPS[-1]:
            break
        rows.append({"optimizer": optimizer, "lr": lr, "seed": seed, "step": step + 1, "epoch": (step + 1) / 50})
    return rows


def falling(speed: float, wobble: float = 0.0) -> Callable[[int], float]:
    return lambda step: 2.3 * math.exp(-speed * step) + wobble * (-1) ** (step // 5) * (step > 0)


def rates() -> pd.DataFrame:
    rows = []
    for seed in (0, 1):
        for lr, sgd, good in ((0.1, 80, 78 + seed), (0.01, 70, 69)):
            rows += run("sgd", lr, seed, falling(0.02 * lr * 10, 0.001), sgd / 100)
            rows += run("good", lr, seed, falling(0.0125 * lr * 10, 0.004), good / 100)
            rows += run("diverging", lr, seed, lambda step: 2.3 if step == 0 else math.nan, 0.1)
        for name in ("sgd", "good", "diverging"):
            rows += run(name, 0.5, seed, lambda step: 2.3 + step, 0.1)
    return pd.DataFrame(rows).assign(dataset="d", model="m", batch_size=10)


def batches() -> pd.DataFrame:
    """On "small" the reading leads until step 50, on "other" never."""
    rows = []
    for model in ("small", "other"):
        late = 2.0 if model == "small" else 3.0
        found = run("sgd", 0.01, 0, lambda step: 2.3 - 0.01 * step, 0.5)
        found += run("good", 0.01, 0, lambda step, top=late: min(2.3 - 0.02 * step + top * max(0, step - 50) / 10, 9)
                     if top == 2.0 else 2.3 + step, 0.5)  # fmt: skip
        found += run("diverging", 0.01, 0, lambda step: 2.3 if step == 0 else math.nan, 0.1)
        rows += [{**row, "model": model} for row in found]
    return pd.DataFrame(rows).assign(dataset="mnist", batch_size=10)


@pytest.fixture(scope="module")
def judged() -> pd.DataFrame:
    return judgements({"rates": rates(), "batches": batches()}, PAIRS, above=0.1).set_index(["reading", "statement"])


@pytest.mark.parametrize(
    ("statement", "value", "met", "cases", "verdict"),
    [
        ("trains", 1.0, 4, 4, "holds"),
        ("near", -1.25, 4, 4, "holds"),
        ("below", -1.25, 4, 4, "holds"),
        ("diverges", 1.0, 2, 2, "holds"),
        ("slower", 1.6, 4, 4, "holds"),
    ],
)
def test_a_reading_that_is_as_the_paper_says(
    judged: pd.DataFrame, statement: str, value: float, met: int, cases: int, verdict: str
) -> None:
    row = judged.loc[("good", statement)]
    if isinstance(row, pd.DataFrame):
        row = row.iloc[0]
    assert row["value"] == pytest.approx(value, rel=0.15)
    assert (row["met"], row["cases"], row["verdict"]) == (met, cases, verdict)


def test_volatility_is_a_ratio_of_standard_deviations(judged: pd.DataFrame) -> None:
    table = summary(rates())
    expected = [table.loc[("good", lr, s), "volatility"] / table.loc[("sgd", lr, s), "volatility"]
                for lr in (0.1, 0.01) for s in (0, 1)]  # fmt: skip
    geometric = math.exp(sum(math.log(r) for r in expected) / 4)
    assert judged.loc[("good", "volatile"), "value"] == pytest.approx(geometric)


def test_the_table_says_how_sgd_and_the_reading_fall_with_the_rate(judged: pd.DataFrame) -> None:
    # SGD 80 to 70: 10 points; the reading 78 (79) to 69: 9 (10) points.
    row = judged.loc[("good", "tables")]
    assert (row["value"], row["met"], row["cases"]) == (pytest.approx(0.5), 1, 2)


def test_a_comparison_with_sgd_needs_its_run() -> None:
    """SGD ran at 0.01 alone, and the reading at 0.1 and above."""
    table = rates()
    part = table[(table["optimizer"] == "sgd") == (table["lr"] == 0.01)]
    found = judgements({"rates": part}, {"sgd": ["good"]}, above=0.1).set_index("statement")
    compared = ["near", "below", "volatile", "slower", "diverges"]
    assert set(found.loc[compared, "verdict"]) == {"not tested at this scale"}
    assert set(found.loc[compared, "cases"]) == {0}


def test_where_sgd_has_not_moved_half_way_nothing_is_slower() -> None:
    """It leaves its start in the last quarter; both learn."""
    late = [row for seed in (0, 1) for row in run("sgd", 0.1, seed, lambda step: 2.3 if step < 70 else 0.9, 0.8)]
    table = rates()
    table = pd.concat([table[table["optimizer"] != "sgd"], pd.DataFrame(late)])
    found = judgements({"rates": table[table["lr"] == 0.1]}, {"sgd": ["good"]}, above=0.1).set_index("statement")
    assert (found.loc["slower", "verdict"], found.loc["near", "cases"]) == ("not tested at this scale", 2)


def test_a_fall_from_the_highest_rate_to_the_lowest_needs_both() -> None:
    """The reading does not learn at 0.01; 0.05 is not the lowest rate."""
    middle = [row for seed in (0, 1) for name in ("sgd", "good") for row in run(name, 0.05, seed, falling(0.02), 0.75)]
    table = rates()
    lost = (table["optimizer"] == "good") & (table["lr"] == 0.01) & (table["step"] > 0)
    table.loc[lost, "val_loss"] = 9.0
    table = pd.concat([table, pd.DataFrame(middle).assign(dataset="d", model="m", batch_size=10)])
    found = judgements({"rates": table}, {"sgd": ["good"]}, above=0.1).set_index("statement")
    assert found.loc["tables", "verdict"] == "not tested at this scale"


def test_each_network_is_judged_and_one_is_enough(judged: pd.DataFrame) -> None:
    rows = judged.loc[("good", "overtaken")].set_index("network")
    assert rows.loc["small", "verdict"] == "holds"
    assert rows.loc["other", "verdict"] == "fails"
    table = score(judged.reset_index())
    assert table["reading"].tolist() == ["good", "diverging"]
    assert table.loc[0, "hold"] >= 6


def test_a_diverging_reading_meets_nothing_but_the_divergence(judged: pd.DataFrame) -> None:
    rows = judged.loc["diverging"].groupby("statement").first()
    assert rows.loc["trains", "met"] == 0
    assert set(rows.loc[["trains", "near", "below", "volatile", "slower", "overtaken"], "verdict"]) == {"fails"}
    assert rows.loc["diverges", "verdict"] == "holds"


def test_the_table_for_people_has_a_row_for_each_reading() -> None:
    table = readings_by_statement({"rates": rates(), "batches": batches()}, PAIRS, above=0.1)
    assert table["reading"].tolist() == ["good", "diverging"]
    assert table.loc[0, "trains at each rate"] == "holds: 1 (4 of 4)"
    assert table.loc[1, "slower than SGD"] == "no runs to judge"
    assert not table.isna().any().any()


def test_a_reading_run_at_some_rates_only_is_open_or_fails() -> None:
    part = rates()
    part = part[(part["optimizer"] == "sgd") | ((part["lr"] == 0.1) & (part["seed"] == 0))]
    found = judgements({"rates": part}, PAIRS, above=0.1).set_index(["reading", "statement"])
    assert found.loc[("good", "trains"), "verdict"] == "not tested at this scale"
    assert found.loc[("diverging", "trains"), "verdict"] == "fails"
    assert found.loc[("good", "diverges"), "cases"] == 0


def test_the_claim_names_the_best_reading_and_what_it_does_not_meet() -> None:
    table = judgements({"rates": rates(), "batches": batches()}, PAIRS, above=0.1)
    outcome = best_reading({"readings": table})
    assert outcome.deciding.name == "good"
    assert "then overtaken" not in outcome.deciding.note
    open_ = set(table[(table["reading"] == "good") & (table["verdict"] == "inconclusive")]["statement"]) - {"tables"}
    assert outcome.verdict == ("inconclusive" if open_ else "holds")
    worse = table[table["reading"] == "diverging"]
    assert best_reading({"readings": worse}).verdict == "fails"


def test_networks_for_mnist_count_once_and_in_any_order() -> None:
    """The statement holds if it does for one network, fails if it does for all, and is open if one was not run."""
    table = judgements({"rates": rates(), "batches": batches()}, PAIRS, above=0.1)
    good = table[table["reading"] == "good"].assign(verdict="holds", met=1, cases=1)
    other = good["network"] == "other"
    assert score(good)[["hold", "met"]].to_numpy().tolist() == [[7, 7]]
    for small, verdict in (("holds", "holds"), ("fails", "fails"), ("not tested at this scale", "inconclusive")):
        for flip in (False, True):
            good.loc[good["statement"] == "overtaken", "verdict"] = small
            good.loc[other, "verdict"] = "fails"
            assert best_reading({"readings": good[::-1] if flip else good}).verdict == verdict
    without = best_reading({"readings": good[good["statement"] != "overtaken"].assign(verdict="holds")})
    assert without.verdict == "inconclusive"


def test_a_run_that_ended_before_the_others_does_not_learn() -> None:
    table = rates()
    table = table[(table["optimizer"] != "good") | (table["step"] <= 60)]
    assert not summary(table).loc["good", "learns"].any()
    assert summary(table).loc["sgd", "learns"].sum() == 4


def test_a_batch_size_at_which_sgd_was_not_run_is_no_case() -> None:
    part = batches()
    part = pd.concat([part, part[part["optimizer"] == "good"].assign(batch_size=20)])
    rows = judgements({"rates": rates(), "batches": part}, PAIRS, above=0.1).set_index(["reading", "statement"])
    rows = rows.loc[("good", "overtaken")].set_index("network")
    assert rows.loc["small", ["met", "cases", "verdict"]].tolist() == [1, 1, "holds"]


def test_the_figure_shows_every_run_and_colours_the_best() -> None:
    figure, drawn = curves_by_reading({"rates": rates(), "batches": batches()}, Style(), PAIRS, above=0.1, shown=1)
    assert set(drawn["optimizer"]) == {"sgd", "good", "diverging"}
    assert len(figure.axes) == 3
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "SGD with the same momentum",
        "good",
    }


POINTS = ("dampening", "initial", "orthonormal", "sequential", "reduction", "scale")
"""What the paper leaves open."""


def test_each_reading_says_all_points_and_no_two_are_the_same() -> None:
    """A reading that leaves a point to the method's default becomes another one when the default does."""
    optimizers = registry.settings("a", "default")["optimizers"]
    readings = {name: block for name, block in optimizers.items() if block["kind"] == "class-gradient-newton"}
    assert len(readings) > 20
    said = {name: [block[point] for point in POINTS] for name, block in readings.items()}
    assert len({str(points) for points in said.values()}) == len(said)
    assert said["running-average-averaged-qr"] == [
        inspect.signature(class_gradient_newton).parameters[point].default for point in POINTS
    ]
