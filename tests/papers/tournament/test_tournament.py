"""The tournament: its arithmetic on made-up races with known answers, its runs on a tiny data set."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from curvspace.datasets import DataSet, Split
from papers.common.context import Context
from papers.common.intervals import interval
from papers.common.style import Style
from papers.tournament.figures import ablation_bars, curves, speed_up_bars, stability_ladder
from papers.tournament.measures import COLUMNS, edge_of_stability, largest_stable_lr, race
from papers.tournament.tables import arrivals, ranking, speed_ups, stable_rates, targets


def made_up_race(optimizer: str, rate: float, seed: int, phase: str = "final", lr: float = 0.1) -> pd.DataFrame:
    """A loss that falls in a straight line from 2 by ``rate`` a step, over 10 steps, at 2 gradients a step."""
    steps = np.arange(0, 11, 2)
    return pd.DataFrame(
        {
            "dataset": "d",
            "model": "m",
            "optimizer": optimizer,
            "batch_size": 8,
            "lr": lr,
            "seed": seed,
            "phase": phase,
            "status": "finished",
            "step": steps,
            "epoch": steps / 5,
            "gradient_evaluations": 2.0 * steps,
            "wall_s": 0.5 * steps,
            "eval_train_loss": 2 - rate * steps,
            "val_loss": 2 - rate * steps,
            "val_accuracy": 0.5,
            "parameters": 3,
        }
    )


def made_up_races() -> pd.DataFrame:
    slow = [made_up_race("sgd", 0.1, seed) for seed in (1, 2)]
    fast = [made_up_race("ours", rate, seed) for seed, rate in ((1, 0.2), (2, 0.4))]
    never = [made_up_race("stuck", 0.05, seed) for seed in (1, 2)]
    tuning = [made_up_race(name, r, 0, "tuning", lr) for name in ("sgd", "ours") for lr, r in ((0.1, 0.1), (1.0, 0.01))]
    tuning += [
        made_up_race("stuck", 0.05, 0, "tuning"),
        made_up_race("broken", 0.0, 0, "tuning").assign(status="diverged"),
    ]
    return pd.concat([*slow, *fast, *never, *tuning], ignore_index=True)


def test_target_is_what_the_reference_reaches_on_every_seed() -> None:
    races = pd.concat([made_up_race("sgd", 0.1, 1), made_up_race("sgd", 0.15, 2)])
    assert targets(races, "sgd").item() == pytest.approx(1.0)


def test_a_reference_run_that_diverged_sets_no_easy_target() -> None:
    races = made_up_races()
    lost = (races["optimizer"] == "sgd") & (races["phase"] == "final") & (races["seed"] == 2)
    races = races[~(lost & (races["step"] > 4))]
    races.loc[lost, "status"] = "diverged"
    races.loc[lost & (races["step"] == 4), "val_loss"] = math.nan
    assert targets(races, "sgd").item() == pytest.approx(1.0)
    found = arrivals(races, "sgd").set_index(["optimizer", "seed"])
    assert found["reached"].to_dict() == {
        **{("sgd", 1): True, ("sgd", 2): False, ("ours", 1): True, ("ours", 2): True},
        **{("stuck", 1): False, ("stuck", 2): False},
    }
    assert found.loc[("ours", 1), "steps"] == pytest.approx(5)
    races.loc[(races["optimizer"] == "sgd") & (races["phase"] == "final"), "status"] = "diverged"
    assert not arrivals(races, "sgd")["reached"].any()


def test_arrival_is_linear_between_evaluations() -> None:
    found = arrivals(made_up_races(), "sgd").set_index(["optimizer", "seed"])
    assert found.loc[("sgd", 1), "steps"] == pytest.approx(10)
    assert found.loc[("ours", 1), "steps"] == pytest.approx(5)  # between evaluations at 4 and 6
    assert found.loc[("ours", 2), "gradient_evaluations"] == pytest.approx(5)
    assert found.loc[("ours", 2), "seconds"] == pytest.approx(1.25)
    assert not found.loc[("stuck", 1), "reached"]
    assert found.loc[("stuck", 1), "steps"] == 10


@pytest.mark.parametrize("end", [2, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, 900.0])
def test_a_run_that_diverged_counts_with_its_whole_budget(end: int, value: float) -> None:
    lost = pd.concat([made_up_race("lost", 0.1, seed) for seed in (1, 2)])
    lost = lost[lost["step"] <= end].assign(status="diverged")
    lost.loc[lost["step"] == end, "val_loss"] = value
    races = pd.concat([made_up_races(), lost])
    found = arrivals(races, "sgd").set_index(["optimizer", "seed"]).loc[("lost", 1)]
    assert (found["steps"], found["gradient_evaluations"], found["seconds"]) == (10, 20, 5)
    table = speed_ups({"races": races}, "sgd", ["sgd", "lost"]).query("unit == 'steps'")
    ratios = table.set_index(["optimizer", "against"])
    assert ratios.loc[("lost", "sgd"), "speed_up"] == pytest.approx(1)
    assert ratios.loc[("ours", "lost"), "speed_up"] == pytest.approx(math.sqrt(2 * 4))
    assert ratios.loc[[("lost", "sgd"), ("ours", "lost"), ("lost", "lost"), ("ours", "sgd")]][
        ["bound", "bound_below"]
    ].to_numpy().tolist() == [[True, False], [False, True], [True, True], [False, False]]


def test_speed_ups_are_paired_geometric_means() -> None:
    table = speed_ups({"races": made_up_races()}, "sgd", ["sgd"])
    row = table[(table["optimizer"] == "ours") & (table["unit"] == "steps")].iloc[0]
    assert row["speed_up"] == pytest.approx(math.sqrt(2 * 4))
    half = 12.706204736 * math.log(2) / 2  # t quantile with one degree of freedom times the standard error
    assert math.log(row["high"] / row["speed_up"]) == pytest.approx(half)
    assert not row["bound"]
    assert table.loc[table["optimizer"] == "stuck", "bound"].all()
    assert (table.loc[table["optimizer"] == "sgd", "speed_up"] == 1).all()


def test_interval_of_one_seed_is_not_a_number() -> None:
    mean, low, high = interval(pd.Series([3.0]))
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_ranking_names_the_best_rate_and_keeps_who_never_got_through() -> None:
    table = ranking({"races": made_up_races()}, "sgd").set_index("optimizer")
    assert table.loc["ours", "best_lr"] == 0.1
    assert table.loc["ours", "edge"]
    assert table.loc["ours", "val_loss"] == pytest.approx((2 - 2 + 2 - 4) / 2)
    assert math.isnan(table.loc["broken", "best_lr"])
    assert table.loc["broken", "tuning_diverged"] == 1
    assert table.loc["broken", "seeds"] == 0
    assert table.loc["stuck", "reached"] == 0


def test_stable_rates_are_ratios_to_the_reference() -> None:
    common = {"dataset": "d", "model": "m", "batch_size": 8}
    rows = [("sgd", 1, 0.1, 0.2), ("sgd", 2, 0.2, 0.3), ("ours", 1, 0.4, 0.5), ("ours", 2, 0.8, math.nan)]
    rows += [("printed", 1, math.nan, 0.01), ("printed", 2, math.nan, 0.01)]
    names = ["optimizer", "seed", "stable_lr", "unstable_lr"]
    found = stable_rates({"stability": pd.DataFrame(rows, columns=names).assign(**common)}, "sgd")
    found = found.set_index("optimizer")
    assert found.loc["ours", "ratio"] == pytest.approx(4)
    assert found.loc["ours", "open_above"] == 1
    assert found.loc["printed", "never_stable"] == 2
    bounds = found.loc[["ours", "printed", "sgd"], ["bound", "bound_below"]]
    assert bounds.to_numpy().tolist() == [[False, True], [True, False], [False, False]]


@pytest.mark.parametrize("edge", [0.05, 0.2, 0.7, 5.0])
def test_bisection_brackets_the_edge(edge: float) -> None:
    low, high = edge_of_stability(lambda lr: lr < edge, [0.1, 1.0], halvings=10)
    if edge < 0.1:
        assert math.isnan(low)
        assert high == 0.1
    elif edge > 1:
        assert low == 1.0
        assert math.isnan(high)
    else:
        assert low < edge <= high
        assert high / low == pytest.approx(10 ** (1 / 2**10))


def tiny_data() -> DataSet:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=g)
    y = torch.randint(0, 3, (120,), generator=g)
    x = centres[y] + 0.3 * torch.randn(120, 6, generator=g)
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 90), (90, 120))]
    return DataSet("tiny", *parts, num_classes=3, mean=None, std=None, input_shape=(6,))


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    context = Context(show_progress=False)
    context._loaded["tiny"] = tiny_data()
    return context


COMMON = {"dataset": "tiny", "model": {"name": "softmax", "kind": "softmax"}, "batch_size": 20}
SGD = {"name": "sgd", "kind": "sgd", "momentum": 0.9}


def test_race_picks_the_rate_on_the_tuning_seed_and_runs_it_on_others(context: Context) -> None:
    task = {"epochs": 3, "evaluate_every": 3}
    table = race(context, **COMMON, optimizer=SGD, task=task, lrs=[1e-4, 0.1], tuning_seeds=[0], seeds=[1, 2])
    assert list(table.columns) == list(COLUMNS)
    final = table[table["phase"] == "final"]
    assert set(final["lr"]) == {0.1}
    assert set(final["seed"]) == {1, 2}
    assert list(final[final["seed"] == 1]["step"]) == [0, 3, 6, 9]
    assert list(final[final["seed"] == 1]["gradient_evaluations"]) == [0, 3, 6, 9]
    again = race(context, **COMMON, optimizer=SGD, task=task, lrs=[1e-4, 0.1], tuning_seeds=[0], seeds=[1, 2])
    pd.testing.assert_frame_equal(table.drop(columns="wall_s"), again.drop(columns="wall_s"))


def test_race_in_which_everything_diverges_has_no_final(context: Context) -> None:
    table = race(context, **COMMON, optimizer=SGD, task={"epochs": 2}, lrs=[1e6, 1e7], tuning_seeds=[0], seeds=[1])
    assert set(table["phase"]) == {"tuning"}
    assert set(table["status"]) == {"diverged"}


def test_largest_stable_rate(context: Context) -> None:
    table = largest_stable_lr(
        context, **COMMON, optimizer=SGD, task={"epochs": 2}, lrs=[0.01, 1e6], seeds=[0], halvings=4
    )
    assert 0.01 <= table["stable_lr"].item() < table["unstable_lr"].item() <= 1e6
    assert table["unstable_lr"].item() / table["stable_lr"].item() == pytest.approx(1e8 ** (1 / 16))


def test_figures_draw_what_the_tables_say() -> None:
    races, style = made_up_races(), Style()
    stability = pd.DataFrame(
        {"dataset": "d", "model": "m", "batch_size": 8, "optimizer": ["sgd", "ours", "broken"], "seed": 1,
         "stable_lr": [0.1, 0.3, math.nan], "unstable_lr": [0.2, 0.4, 0.01]}
    )  # fmt: skip
    with style.applied():
        figure, drawn = curves({"races": races}, style, "sgd")
        assert len(figure.axes) == 2
        assert set(drawn["optimizer"]) == {"sgd", "ours", "stuck"}
        _, table = speed_up_bars({"races": races}, style, "sgd", ["sgd"])
        assert len(table) == 9
        figure, table = stability_ladder({"stability": stability}, style, "sgd")
        assert any("none stable" in text.get_text() for text in figure.axes[0].texts)
        figure, table = ablation_bars({"races": races}, style, "sgd", "ours")
        axis, losses = figure.axes[0], table["val_loss"].dropna()
        edge = axis.get_xlim()[1]
        dots = {round(float(line.get_xdata()[0]), 9) for line in axis.lines if line.get_marker() == "o"}
        assert dots == set(losses[losses < edge].round(9))
        assert dots  # and what is beyond is an arrow at the edge
        arrows = [line for line in axis.lines if line.get_marker() == ">"]
        assert len(arrows) >= (losses >= edge).sum()


def test_figures_survive_a_tournament_in_which_everything_diverged() -> None:
    broken = [made_up_race(name, 0.0, 0, "tuning").assign(status="diverged") for name in ("sgd", "ours")]
    tables, style = {"races": pd.concat(broken, ignore_index=True)}, Style()
    with style.applied():
        assert curves(tables, style, "sgd")[1].empty
        assert speed_up_bars(tables, style, "sgd", ["sgd"])[1].empty
        assert ablation_bars(tables, style, "sgd", "ours")[1]["best_lr"].isna().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mean_loss_does_not_leave_out_the_run_that_diverged(value: float) -> None:
    races = made_up_races()
    lost = (races["optimizer"] == "stuck") & (races["phase"] == "final") & (races["seed"] == 1)
    races.loc[lost, "status"] = "diverged"
    races.loc[lost & (races["step"] == 10), ["val_loss", "eval_train_loss"]] = value
    row = ranking({"races": races}, "sgd").set_index("optimizer").loc["stuck"]
    assert row["diverged"] == 1
    assert row[["val_loss", "eval_train_loss"]].tolist() == [math.inf, math.inf]
    assert math.isnan(row["val_loss_high"])
    assert row["val_accuracy"] == 0.5


def test_one_seed_has_a_dot_and_no_arrow() -> None:
    races = pd.concat([made_up_race(name, rate, seed, phase) for seed, phase in ((0, "tuning"), (1, "final"))
                       for name, rate in (("sgd", 0.1), ("ours", 0.15))])  # fmt: skip
    style = Style()
    with style.applied():
        figure, _ = ablation_bars({"races": races}, style, "sgd", "ours")
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert markers.count("o") == 2
    assert markers.count(">") == 0


def test_the_axis_of_speed_ups_is_named_with_one_rival_too() -> None:
    style = Style()
    with style.applied():
        figure, _ = speed_up_bars({"races": made_up_races()}, style, "sgd", ["sgd"])
    assert [axis.get_xlabel() for axis in figure.axes] == ["speed-up"]
