"""The race: its arithmetic on made-up runs with known answers, its runs and their resuming on a tiny data set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from papers.common.context import Context
from papers.common.intervals import interval
from papers.common.style import Style
from papers.race import measures
from papers.race.figures import horizons, tuning
from papers.race.figures import speed_ups as draw_speed_ups
from papers.race.measures import quasi_random, race, with_values
from papers.race.tables import at_edge, results, speed_up, speed_ups

HORIZONS = (0.25, 0.5, 1.0)
FAMILIES = [("plain", "rival"), ("twice", "ours")]


def made_up(optimizer: str, pace: float, seeds: int = 3) -> pd.DataFrame:
    """Final losses 2 - ln(pace·h/0.25) + 0.01·seed: a method of pace p is at every loss p times as fast."""
    rows = []
    for seed in range(seeds):
        for h in HORIZONS:
            loss = 2 - np.log(pace * h / 0.25) + 0.01 * seed
            rows.append(
                {"phase": "final", "seed": seed, "horizon": h, "val_loss": loss, "trial": 0, "status": "finished"}
            )
    rows.append({"phase": "tuning", "seed": 9, "horizon": 1.0, "val_loss": 1.0, "trial": 0, "status": "finished"})
    common = {"dataset": "d", "model": "m", "batch_size": 8, "optimizer": optimizer, "lr": 0.1, "start_loss": 3.0}
    more = {"train_loss": 1.0, "val_accuracy": 0.5, "worst_class_accuracy": 0.1, "average_val_loss": np.nan}
    cost = {"wall_s": 2.0, "steps": 100, "gradient_evaluations": 120.0, "bounds": "{'lr': [0.01, 1.0]}"}
    return pd.DataFrame(rows).assign(**common, **more, **cost)


@pytest.fixture
def races() -> pd.DataFrame:
    return pd.concat([made_up("plain", 1.0), made_up("twice", 2.0)], ignore_index=True)


@pytest.mark.parametrize("pace", [1.0, 1.5, 2.0, 3.9])
def test_speed_up_is_the_ratio_of_paces_both_ways(pace):
    h = np.array(HORIZONS)
    ours, theirs = 2 - np.log(pace * h / 0.25), 2 - np.log(h / 0.25)
    assert speed_up(h, ours, theirs) == (pytest.approx(pace), False)
    assert speed_up(h, theirs, ours)[0] == pytest.approx(1 / pace)


def test_beyond_the_shortest_horizon_there_is_a_bound_only():
    h = np.array(HORIZONS)
    assert speed_up(h, 2 - np.log(9 * h), 2 - np.log(h)) == (pytest.approx(4.0), True)


def test_speed_ups_with_intervals_and_chances(races):
    """A seed that is harder by as much for both says nothing about either; one that is so for one alone does."""
    row = speed_ups({"races": races}, ["plain"]).iloc[0]
    assert row["optimizer"] == "twice"
    assert list(row[["speed_up", "low", "high"]]) == pytest.approx([2.0, 2.0, 2.0])
    assert row["beats"] == 1.0
    assert row["seeds"] == 3
    races.loc[races["optimizer"].eq("twice"), "val_loss"] -= 0.02 * races["seed"]
    row = speed_ups({"races": races}, ["plain"]).iloc[0]
    assert row["speed_up"] == pytest.approx(2 * np.exp(0.02))


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_interval_is_students_where_each_seed_has_a_speed_up_of_its_own(seeds):
    """Losses are linear in the logarithm of the length here, so that of the speed-up is a mean over seeds."""
    own = 0.02 * np.random.default_rng(seeds).standard_normal(seeds)
    races = pd.concat([made_up("plain", 1.0, seeds), made_up("twice", 2.0, seeds)], ignore_index=True)
    ours = races["optimizer"].eq("twice") & races["phase"].eq("final")
    races.loc[ours, "val_loss"] -= own[races.loc[ours, "seed"]]
    row = speed_ups({"races": races}, ["plain"]).iloc[0]
    mean, low, high = interval(pd.Series(np.log(2) + own))
    assert np.log(row["speed_up"]) == pytest.approx(mean)
    assert np.log(row["high"]) - np.log(row["low"]) == pytest.approx(high - low, rel=0.1)


def test_an_interval_does_not_reach_beyond_the_shortest_horizon():
    races = pd.concat([made_up("plain", 1.0), made_up("twice", 3.5)], ignore_index=True)
    races.loc[races["optimizer"].eq("twice"), "val_loss"] -= 0.1 * races["seed"]
    row = speed_ups({"races": races}, ["plain"]).iloc[0]
    assert row["low"] < row["speed_up"] <= row["high"] == 4.0


def test_two_are_compared_on_the_seeds_that_both_have(races):
    """The seeds that only one has are the hard ones here: with them it would seem the slower by more than it is."""
    hard = made_up("plain", 0.5, seeds=6)
    more = pd.concat([races, hard[(hard["phase"] == "final") & (hard["seed"] >= 3)]], ignore_index=True)
    row = speed_ups({"races": more}, ["plain"]).iloc[0]
    assert row["speed_up"] == pytest.approx(2.0)
    assert row["seeds"] == 3
    apart = more[~(more["optimizer"].eq("plain") & more["seed"].lt(3))]
    assert speed_ups({"races": apart}, ["plain"]).empty


def test_a_diverged_seed_counts_with_the_loss_of_its_start(races):
    lost = races["optimizer"].eq("twice") & races["seed"].eq(0) & races["horizon"].eq(1.0)
    races.loc[lost, ["status", "val_loss"]] = ["diverged", np.nan]
    table = speed_ups({"races": races}, ["plain"])
    assert table["speed_up"].iloc[0] < 1.0
    assert table["beats"].iloc[0] == pytest.approx(2 / 3)
    assert results({"races": races}).query("optimizer == 'twice' and horizon == 1.0")["diverged"].item() == 1


def test_results_say_which_hyper_parameter_is_at_the_edge(races):
    races.loc[races["optimizer"].eq("twice"), "lr"] = 0.9
    edges = results({"races": races}).groupby("optimizer")["edge"].first()
    assert edges["plain"] == ""
    assert edges["twice"] == "lr"
    assert at_edge(0.011, 0.01, 1.0)
    assert not at_edge(0.1, 0.01, 1.0)


def test_quasi_random_points_are_log_uniform_and_the_same_for_all():
    first = quasi_random({"lr": [0.01, 1.0], "1-momentum": [0.03, 0.3]}, 64)
    second = quasi_random({"1-betas.0": [0.03, 0.3], "lr": [0.1, 10.0]}, 64)
    three = [
        quasi_random({name: [0.1, 1.0] for name in names}, 5)
        for names in (("1-momentum", "lr", "weight_decay"), ("1-base.momentum", "base.weight_decay", "lr"))
    ]
    assert [p["lr"] for p in three[0]] == [p["lr"] for p in three[1]]
    assert [p["weight_decay"] for p in three[0]] == [p["base.weight_decay"] for p in three[1]]
    assert [10 * p["lr"] for p in first] == pytest.approx([p["lr"] for p in second])
    assert np.median([p["lr"] for p in first]) == pytest.approx(0.1, rel=0.2)
    assert all(0.03 <= p["1-momentum"] <= 0.3 for p in first)


def test_values_are_set_at_their_places_and_the_block_is_left_alone():
    block = {"name": "x", "kind": "span-filter", "base": {"kind": "sgd", "momentum": 0.9}, "betas": [0.9, 0.99]}
    lr, options = with_values(block, {"lr": 0.2, "1-base.momentum": 0.25, "1-betas.0": 0.5})
    assert lr == 0.2
    assert options == {"base": {"kind": "sgd", "momentum": 0.75}, "betas": [0.5, 0.99]}
    assert block["base"]["momentum"] == 0.9


SPEC = {
    "dataset": "tiny",
    "model": {"name": "softmax", "kind": "softmax"},
    "optimizer": {"name": "plain", "kind": "sgd", "momentum": 0.9},
    "task": {"epochs": 2, "schedule": {"kind": "cosine", "warmup": 0.1}},
    "batch_size": 10,
    "search": {"lr": [0.05, 0.5], "1-momentum": [0.1, 0.5]},
    "trials": 2,
    "tuning_seeds": [0],
    "tuning_horizon": 1.0,
    "seeds": [1, 2],
    "horizons": [0.5, 1.0],
}


def test_a_race_has_its_runs_and_continues_where_it_was_stopped(tmp_path, monkeypatch, tiny):
    context = Context(show_progress=False, scratch=tmp_path / "scratch", code="abc", _loaded={"tiny": tiny})
    trained: list[int] = []
    whole = measures._train

    def counted(*arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(1)
        return whole(*arguments)

    monkeypatch.setattr(measures, "_train", counted)
    with pytest.raises(KeyboardInterrupt):
        race(context, **SPEC)
    monkeypatch.setattr(measures, "_train", whole)
    resumed = race(context, **SPEC)
    fresh = race(Context(show_progress=False, _loaded={"tiny": tiny}), **SPEC)
    same = [c for c in fresh if c != "wall_s"]
    pd.testing.assert_frame_equal(resumed[same], fresh[same])
    assert (resumed["phase"] == "tuning").sum() == 2
    assert (resumed["phase"] == "final").sum() == 4
    assert set(resumed.loc[resumed["phase"] == "final", "steps"]) == {4, 8}
    other = Context(show_progress=False, scratch=tmp_path / "scratch", code="changed", _loaded={"tiny": tiny})
    monkeypatch.setattr(measures, "_train", counted)
    with pytest.raises(KeyboardInterrupt):  # other code: nothing of the former is taken
        race(other, **SPEC)


def test_figures_draw_what_the_tables_say(races):
    tables = {"races": races}
    figure, drawn = horizons(tables, Style(), FAMILIES)
    assert drawn.query("optimizer == 'twice' and horizon == 1.0")["val_loss"].item() == pytest.approx(
        2 - np.log(8) + 0.01
    )
    assert len(figure.axes) == 1
    _, table = draw_speed_ups(tables, Style(), FAMILIES, ["plain"])
    assert table["family"].tolist() == ["ours"]
    _, tried = tuning(tables, Style(), FAMILIES)
    assert tried["chosen"].all()
    assert len(tried) == 2


def test_a_trial_that_diverged_on_one_of_two_tuning_seeds_is_drawn_as_lost(races):
    second = races[(races["phase"] == "tuning") & (races["optimizer"] == "plain")].assign(
        seed=8, status="diverged", val_loss=np.nan
    )
    figure, tried = tuning({"races": pd.concat([races, second])}, Style(), FAMILIES)
    lost = tried.set_index("optimizer")["val_loss"].isna()
    assert lost.to_dict() == {"plain": True, "twice": False}
    crosses = [len(line.get_xdata()) for axis in figure.axes for line in axis.lines if line.get_marker() == "x"]
    assert crosses == [1, 0]


def test_a_class_without_validation_examples_is_not_the_worst_one(tiny):
    """Three classes, of which the validation set has two; the network says 0 to all."""
    data = dataclasses.replace(tiny, num_classes=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert measures.class_accuracies(model, tiny) == [1.0, 0.0]
    with torch.no_grad():
        model[1].weight.copy_(torch.ones(16) * torch.tensor([-1.0, 1.0, 0.0])[:, None])
        model[1].bias.copy_(torch.tensor([0.0, 0.0, -1e6]))
    assert measures.class_accuracies(model, data) == [1.0, 1.0]
