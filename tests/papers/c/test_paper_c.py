"""Paper C's tables, figures and study on made-up tables and small configs."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from papers import registry
from papers.c import figures, study
from papers.c import measures as paper_c
from papers.c import tables as tables_c
from papers.common.study import Run
from papers.common.style import Style, save

GRIDS = {
    "sgd": {"lr": [1e-3, 10.0], "momentum": [0.95]},
    "levenberg-marquardt": {"damping": [1.0], "factor": [2.0]},
    "curveball": {"damping": [1.0]},
}


class Silent:
    def progress(self, items, description="", total=None):
        return items


@pytest.fixture(scope="module")
def small():
    settings: dict[str, Any] = {
        "runs": 4,
        "search_runs": 2,
        "tolerance": 1e-4,
        "limit": 1500,
        "grids": GRIDS,
        "seed": 0,
    }
    names = ("deterministic", "Rahimi-Recht")
    return pd.concat([paper_c.small_problem(Silent(), problem=name, **settings) for name in names])


def test_small_problem_searches_on_other_runs_than_it_reports(small):
    chosen = tables_c.search({"small": small})
    sgd = chosen[(chosen["solver"] == "sgd") & (chosen["problem"] == "deterministic")]
    assert list(sgd["chosen"]) == [True, False]
    assert list(sgd["reached"]) == [1.0, 0.0]
    assert sgd["iterations"].iloc[1] == 1500
    table = tables_c.iterations({"small": small}, study.PUBLISHED["iterations"]).set_index(["problem", "solver"])
    row = table.loc[("deterministic", "curveball")]
    assert (row["runs"], row["reached"], row["paper_mean"]) == (4, 4, 13)
    assert 10 < row["mean"] < 20
    assert "adam" not in small["solver"].unique()


def test_trajectories_end_below_the_tolerance(small):
    paths = small[(small["stage"] == "trajectory") & (small["problem"] == "deterministic")]
    final = small[(small["stage"] == "final") & (small["run"] == 0)].set_index(["problem", "solver"])
    for solver, path in paths.groupby("solver"):
        assert path["objective"].iloc[-1] < 1e-4
        assert (path["objective"].iloc[:-1] >= 1e-4).all()
        assert len(path) - 1 == final.loc[("deterministic", solver), "iterations"]


def test_trajectories_are_those_of_the_runs_that_are_counted_with_noise_too():
    grids = {**GRIDS, "sgd": {"lr": [5e-4], "momentum": [0.9]}}
    settings = {"runs": 5, "search_runs": 2, "tolerance": 1e-4, "limit": 5000, "grids": grids, "seed": 0, "traced": 3}
    table = paper_c.small_problem(Silent(), problem="U[0, 3]", **settings)
    final = table[table["stage"] == "final"].set_index(["solver", "run"])["iterations"]
    paths = table[table["stage"] == "trajectory"].groupby(["solver", "run"])["iteration"].max()
    assert len(paths) == 4 * 3
    assert paths.to_dict() == final[paths.index].to_dict()


def metrics(optimizer: str, lr: float, errors: list[float], seed: int = 0, **columns: float) -> pd.DataFrame:
    identity = {"dataset": "d", "model": "m", "optimizer": optimizer, "batch_size": 8, "lr": lr, "seed": seed}
    steps = np.arange(len(errors))
    return pd.DataFrame(
        {
            **identity,
            "step": 10 * steps,
            "epoch": steps.astype(float),
            "wall_s": 0.5 * steps,
            "eval_train_loss": errors,
            "eval_train_accuracy": 1 - np.array(errors),
            "val_accuracy": 0.9 - np.array(errors),
            **columns,
        }
    )


def runs() -> pd.DataFrame:
    rates: dict[str, Any] = {"rho": 0.5, "beta": 0.1, "damping": 2.0, "ratio": 0.9}
    return pd.concat(
        [
            metrics("curveball", 1.0, [0.9, 0.3, 0.2], **rates),
            metrics("curveball", 1.0, [0.9, 0.3, 0.4], seed=1, **rates),
            metrics("sgd", 0.1, [0.9, 0.2, 0.5]),
            metrics("sgd", 0.01, [0.9, 0.4, 0.3]),
            metrics("sgd", 1.0, [0.9, 0.1]),  # cut short: diverged
        ]
    )


def test_errors_take_the_best_epoch_of_the_best_learning_rate():
    table = tables_c.errors({"basic": runs()}, study.PUBLISHED["errors"]).set_index("optimizer")
    assert table.loc["sgd", "lr"] == 0.01
    assert table.loc["sgd", "lrs_tried"] == "0.01 0.1 1"
    assert table.loc["sgd", "train_error_percent"] == pytest.approx(30)
    assert table.loc["curveball", "train_error_percent"] == pytest.approx(25)
    assert table.loc["curveball", "val_error_percent"] == pytest.approx(35)
    assert table.loc["curveball", "paper_train_error_percent"] == 14.1


def test_damping_table_orders_by_the_first_damping():
    both = pd.concat([metrics("b", 1.0, [0.5, 0.1], damping=9.0), metrics("a", 1.0, [0.5, 0.2], damping=1.0)])
    table = tables_c.damping_sensitivity({"runs": both})
    assert list(table["optimizer"]) == ["a", "b"]
    assert list(table["train_error_percent"]) == pytest.approx([20, 10])


def test_damping_table_has_means_over_seeds():
    seeds = [metrics("a", 1.0, [0.5, 0.2], seed, damping=1.0 + seed) for seed in range(3)]
    row = tables_c.damping_sensitivity({"runs": pd.concat(seeds)}).iloc[0]
    assert row[["damping_after_step_1", "last_damping"]].tolist() == [2.0, 2.0]


def test_costs_are_medians_relative_to_the_first():
    rows = [
        {"dataset": "d", "model": "m", "batch_size": 8, "optimizer": name, "round": i, "step_s": s, "relative": s,
         "gradient_evaluations": 2.0, "parameter_copies": 2.0}
        for name, times in (("sgd", (1, 1, 2)), ("curveball", (2, 3, 4)))
        for i, s in enumerate(times)
    ]  # fmt: skip
    table = tables_c.costs({"costs": pd.DataFrame(rows)}).set_index("optimizer")
    assert list(table["relative"]) == [1, 3]


@pytest.mark.parametrize("name", ["trajectories", "training_error", "error_by_time", "rates"])
def test_figures_draw_what_they_return(name, small, tmp_path):
    rosenbrock = small[small["problem"] == "deterministic"]
    tables = {"small": rosenbrock} if name == "trajectories" else {"basic": runs()}
    if name == "rates":
        tables = {"basic": runs()[lambda t: t["optimizer"] == "curveball"]}
    style = Style()
    with style.applied():
        figure, table = getattr(figures, name)(tables, style)
        save(figure, table, tmp_path / "figure.csv", 50)
    assert len(pd.read_csv(tmp_path / "figure.csv")) == len(table) > 0


def config() -> dict:
    """What the study reads at the default scale."""
    shared, own = (registry.settings(name, "default") for name in ("common", "c"))
    return {section: {**shared.get(section, {}), **own.get(section, {})} for section in {*shared, *own}}


def test_study_leaves_out_what_is_not_configured_and_says_so(capsys):
    given = config()
    block = given["studies"]["c"]["networks"]["basic"]
    given["studies"]["c"]["networks"]["vgg-f"] = {**block, "dataset": "imagenet-100-absent", "model": "vgg-f"}
    declared = {a.id: a for a in study.declare(given).artefacts}
    assert "vgg-f is skipped: no data set 'imagenet-100-absent'" in capsys.readouterr().err
    assert set(declared) == {"C-F1", "C-F2", "C-F2d", "C-F3", "C-T1", "C-T1s", "C-T2", "C-T3", "C-T4", "C-X1"}
    assert "vgg-f" not in declared["C-F2"].inputs
    given["datasets"]["imagenet-100-absent"] = {"source": "imagefolder"}
    declared = {a.id: a for a in study.declare(given).artefacts}
    assert "vgg-f" in declared["C-F2"].inputs
    assert "mnist-mlp" in declared["C-F2d"].inputs


def test_kfac_is_left_out_without_its_library(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    study._say.cache_clear()
    sources = [source for artefact in study.declare(config()).artefacts for source in artefact.sources]
    names = {source.optimizer for source in sources if isinstance(source, Run)}
    assert "kfac" not in names
    assert "curvlinops is not installed" in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_kfac_descends_and_reload_continues_bit_for_bit(refresh_every):
    pytest.importorskip("curvlinops")
    from curvspace.functional import parameter_vector
    from curvspace.optim.kfac import KFAC

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(2, (16,))
    other = copy.deepcopy(model)
    opt, resumed = KFAC(model, lr=0.05, refresh_every=refresh_every), KFAC(other, lr=0.05, refresh_every=refresh_every)
    losses = [float(opt.step(x, y)) for _ in range(10)]
    assert losses[-1] < losses[0]
    resumed.load_state_dict(KFAC(other, lr=0.05, refresh_every=refresh_every).state_dict())
    for _ in range(4):
        resumed.step(x, y)
    third = copy.deepcopy(other)
    again = KFAC(third, lr=0.05, refresh_every=refresh_every)
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    copied = copy.deepcopy(resumed)
    assert torch.equal(resumed.step(x, y), again.step(x, y))
    copied.step(x, y)
    assert torch.equal(parameter_vector(other), parameter_vector(copied.model))
    assert torch.equal(parameter_vector(other), parameter_vector(third))


@pytest.mark.parametrize(
    "options", [{"damping": 0.0}, {"momentum": 1.0}, {"average": -0.1}, {"loss": "mse"}, {"refresh_every": 0}]
)
def test_kfac_names_bad_hyper_parameters(options):
    from curvspace.optim.kfac import KFAC

    with pytest.raises(ValueError, match=next(iter(options))):
        KFAC(nn.Linear(2, 2), **options)


def test_rates_are_drawn_of_one_run():
    rates: dict[str, Any] = {"rho": 0.5, "beta": 0.1, "damping": 2.0, "ratio": 0.9}
    better, worse = (metrics("curveball", lr, [0.9, end], **rates) for lr, end in ((1.0, 0.2), (0.3, 0.4)))
    _, drawn = figures.rates({"basic": pd.concat([worse.assign(rho=7.0), better])}, Style())
    assert drawn["step"].tolist() == [0, 10]
    assert set(drawn["rho"]) == {0.5}
