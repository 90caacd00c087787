"""Paper D's measures on a short run against the dense Hessian; its tables on made-up rows."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from curvspace.errors import UserError
from curvspace.training.run import train
from curvspace.training.spec import RunSpec
from papers.common.context import Context
from papers.d import measures as paper_d
from papers.d import tables as tables_d
from tests.unit.oracles import dense_hessian

FRACTION = 0.25


@pytest.fixture(scope="module")
def context(digits_dir, tmp_path_factory) -> Context:
    spec = RunSpec.from_dict(
        {
            "dataset": {"name": "digits", "source": "digits", "train": 400, "validation": 100},
            "model": {"name": "lenet", "kind": "lenet", "channels": [2, 2], "dense": 4},
            "optimizer": {"name": "nc", "kind": "negative-curvature", "base": "RMSprop"},
            "task": {"epochs": 4, "checkpoints": [0, 20]},
            "batch_size": 40,
            "lr": 0.01,
        }
    )
    run = train(spec, digits_dir, tmp_path_factory.mktemp("d") / "run", progress=False)
    return Context(runs=[run], data_dir=digits_dir.parent, show_progress=False)


KNOWN: dict[tuple[int, float], torch.Tensor] = {}


def dense_at(context: Context, step: int, fraction: float = FRACTION) -> torch.Tensor:
    """The dense Hessian at a checkpoint of the module's one run, made once."""
    (run,) = context.runs
    if (step, fraction) not in KNOWN:
        subset = paper_d.fixed_subset(context, run, fraction)
        KNOWN[step, fraction] = dense_hessian(context.model(run, step), subset, "cross_entropy")
    return KNOWN[step, fraction]


def test_spectrum_is_that_of_the_dense_hessian(context):
    table = paper_d.spectrum(context, top=3, bottom=2, fraction=FRACTION, tol=1e-3)
    assert sorted(table["step"].unique()) == [0, 20, 40]
    for step, part in table.groupby("step"):
        values = torch.linalg.eigvalsh(dense_at(context, step)).numpy()
        for end, expected in (("LA", values[::-1][:3]), ("SA", values[:2])):
            found = part[part["end"] == end]["eigenvalue"].to_numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)
    assert (table["examples"] == 100).all()


@pytest.mark.parametrize("smallest", [-20.0, -0.5, 0.0])
def test_the_negative_end_is_found_below_large_outliers(smallest):
    values = torch.cat([torch.tensor([smallest, 60.0, 100.0]), torch.linspace(0, 0.3, 297)])
    found = paper_d.TwoEnds(top=2, bottom=1, tol=0.02).update(torch.diag(values))
    torch.testing.assert_close(found["LA"].values, torch.tensor([100.0, 60.0]), rtol=1e-3, atol=0)
    accuracy = 0.02 * max(abs(smallest), 1.0)  # or a hundredth of the largest
    assert float(found["SA"].residuals.max()) <= accuracy
    torch.testing.assert_close(found["SA"].values, torch.tensor([smallest]), rtol=0, atol=accuracy)


def test_the_subset_is_the_same_at_every_call(context):
    (run,) = context.runs
    (x, y), (again, _) = (paper_d.fixed_subset(context, run, FRACTION)[0] for _ in range(2))
    assert torch.equal(x, again)
    assert len(y) == 100


def test_curvature_along_a_fixed_direction(context):
    table = paper_d.fixed_directions(context, [20], [40], FRACTION, tol=1e-3)
    for end, origin, column in (("LA", 20, -1), ("SA", 40, 0)):
        v = torch.linalg.eigh(dense_at(context, origin))[1][:, column]
        for _, row in table[table["end"] == end].iterrows():
            assert row["curvature"] == pytest.approx(float(v @ dense_at(context, row["step"]) @ v), rel=0.05, abs=2e-3)


def test_a_step_without_checkpoint_is_named(context):
    with pytest.raises(UserError, match="step 7"):
        paper_d.profiles(context, 7, [0.1], FRACTION)


def test_profiles_touch_their_quadratic_model(context):
    table = paper_d.profiles(context, 40, [0.02], FRACTION, points=5, tol=1e-3)
    assert set(table["reading"]) == set(paper_d.READINGS)
    for _, part in table[table["reading"] == "unit"].groupby("end"):
        change = part["quadratic"].max() - part["quadratic"].min()
        assert (part["loss"] - part["quadratic"]).abs().max() < 0.1 * change
        assert part["quadratic"].to_numpy()[3] < part["quadratic"].to_numpy()[1], "positive α goes downhill"


def test_directions_hold_what_their_columns_say(context):
    table = paper_d.directions(context, 40, 3, 2, 2, 2, [0.01, 0.5], 2.0, FRACTION, tol=1e-3)
    assert table["kind"].value_counts().to_dict() == {"LA": 3, "SA": 2, "class gradient": 2, "random": 2}
    values = torch.linalg.eigvalsh(dense_at(context, 40)).numpy()
    np.testing.assert_allclose(table[table["kind"] == "LA"]["curvature"], values[::-1][:3], rtol=1e-2)
    (run,) = context.runs
    model, (batch,) = context.model(run, 40), paper_d.fixed_subset(context, run, FRACTION)
    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    top = torch.linalg.eigh(dense_at(context, 40))[1][:, -1]
    assert table["loss"].tolist() == pytest.approx([loss.item()] * len(table), rel=1e-5)
    assert abs(table["slope"].iloc[0]) == pytest.approx(abs(float(gradient @ top)), rel=0.05)
    assert table["fit_unit_0.5"].notna().all()
    gains = table[table["improves"]]
    assert (gains["improvement"] > 0).all()
    np.testing.assert_allclose(gains["inverse_alpha"] * gains["displacement"], -gains["slope"], rtol=1e-9)
    assert (table["evaluations"] > 0).all()


def test_solver_costs_reach_the_same_eigenvalues(context):
    table = paper_d.solver_costs(context, 40, top=4, bottom=2, fraction=FRACTION, tol=1e-3)
    for _, part in table.groupby("end"):
        assert part["solver"].tolist() == ["ARPACK", "curvspace"]
        assert part["smallest_eigenvalue"].iloc[0] == pytest.approx(part["smallest_eigenvalue"].iloc[1], rel=1e-2)
    counted = tables_d.solver_costs({"costs": table})
    assert (counted[counted["end"] == "LA"]["products_over_LA"] == 1).all()


def test_a_subset_agrees_with_itself(context):
    same = paper_d.subset_agreement(context, 40, 2, 1.0, tol=1e-3)
    assert same["principal_angle_deg"].max() < 0.5
    np.testing.assert_allclose(same["part_eigenvalue"], same["all_eigenvalue"], rtol=1e-3)
    part = paper_d.subset_agreement(context, 40, 2, FRACTION, tol=1e-3)
    assert part["principal_angle_deg"].max() > 1
    full = torch.linalg.eigvalsh(dense_at(context, 40, 1.0)).numpy()
    np.testing.assert_allclose(part[part["end"] == "LA"]["all_eigenvalue"], full[::-1][:2], rtol=1e-2)
    relative = tables_d.subset_agreement({"agreement": part})["relative_difference"]
    np.testing.assert_allclose(
        relative, part["part_eigenvalue"] / part["all_eigenvalue"].abs() - np.sign(part["all_eigenvalue"])
    )


def test_running_estimate_against_the_dense_pair(context):
    (run,) = context.runs
    table = paper_d.running_estimate(context, bottom=2, fraction=FRACTION, tol=1e-3)
    assert table["step"].tolist() == [20, 40]
    hessian = dense_at(context, 40)
    values, vectors = torch.linalg.eigh(hessian)
    v = run.checkpoint(40)["optimizer"]["extra"]["v"]
    row = table.iloc[-1]
    assert row["eigenvalue"] == pytest.approx(float(values[0]), rel=1e-2)
    assert row["curvature"] == pytest.approx(float(v @ hessian @ v), rel=1e-3, abs=1e-6)
    assert row["cosine"] == pytest.approx(float((v @ vectors[:, 0]).abs()), abs=1e-2)
    assert row["share"] == pytest.approx(float((v @ vectors[:, :2]).square().sum()), abs=2e-2)
    assert row["estimate"] == pytest.approx(run.metrics["curvature_estimate"].iloc[-1])


def test_scan_speed_names_its_methods(context):
    table = tables_d.scan_speed({"speed": paper_d.scan_speed(context, FRACTION, [2], points=4)})
    assert table["points_at_once"].tolist() == [1, 2]
    assert table["relative_to_loop"].iloc[0] == 1.0


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    x, y = pd.Series(rng.normal(size=20)), pd.Series(rng.normal(size=20))
    assert tables_d.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(tables_d.rank_correlation(x[:2], y[:2]))


def made_up_directions() -> pd.DataFrame:
    rows = [
        ("LA", 4.0, 4.2, 0.1),
        ("LA", 2.0, 1.9, 0.3),
        ("LA", 1.0, 1.1, 0.2),
        ("SA", -1.0, -0.1, 0.4),
        ("random", 0.1, np.nan, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["kind", "curvature", "inverse_alpha", "improvement"])
    table["improves"], table["at_edge"] = table["improvement"] > 0, False
    return table.assign(step=5, index=1, search_radius=2.0, examples=10, dataset="d", model="m", slope=0.1)


def test_line_searches_in_numbers():
    table = tables_d.line_searches({"directions": made_up_directions()}).set_index("directions")
    positive, negative = table.loc["eigenvectors, positive curvature"], table.loc["eigenvectors, negative curvature"]
    assert positive["rank_inverse_alpha"] == pytest.approx(1.0)
    assert (positive["share_of_total"], negative["share_of_total"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert positive["alpha_times_curvature"] == pytest.approx(4.0 / 4.2)
    assert table.loc["random", "improve_nowhere"] == 1


def made_up_runs() -> pd.DataFrame:
    """Losses exp(-rate * cost), costs 1 and 2 gradients a step; the run of seed 1 of "wild" breaks off."""
    rows = []
    for optimizer, rate, cost, seeds in (("base", 0.1, 1, 3), ("ours", 0.2, 2, 3), ("wild", 0.5, 1, 2)):
        for seed in range(seeds):
            last = 4 if (optimizer, seed) == ("wild", 1) else 10
            for step in range(last + 1):
                spent = cost * step if step else np.nan
                loss = (1 + 0.1 * seed) * np.exp(-rate * (1 + 0.1 * seed) * cost * step)
                rows.append((optimizer, seed, step, spent, loss))
    table = pd.DataFrame(rows, columns=["optimizer", "seed", "step", "gradient_evaluations", "eval_train_loss"])
    return table.assign(dataset="d", model="m", batch_size=1, lr=0.1, val_accuracy=0.5, wall_s=table["step"] * 1.0)


def test_losses_are_compared_at_the_same_cost():
    at = tables_d.at_budget(made_up_runs())
    assert (at["budget"] == 10).all()
    ours = at[at["optimizer"] == "ours"]
    assert (ours["steps"] == 5).all()
    np.testing.assert_allclose(ours.sort_values("seed")["eval_train_loss"].iloc[0], np.exp(-2.0))
    assert at[(at["optimizer"] == "wild")]["diverged"].tolist() == [False, True]


@pytest.mark.parametrize("end", [math.nan, math.inf, 900.0])
def test_a_setting_that_diverges_on_all_seeds_does_not_set_the_cost(end):
    """It ends at its third step, with a loss or without one; the others are compared where they were before."""
    lost = made_up_runs().query("optimizer == 'base' and step <= 3").assign(lr=10.0)
    lost.loc[lost["step"] == 3, "eval_train_loss"] = end
    without, runs = made_up_runs(), pd.concat([made_up_runs(), lost])
    at = tables_d.at_budget(runs)
    assert (at["budget"] == 10).all()
    assert at.loc[at["lr"] == 10.0, "diverged"].all()
    columns = ["optimizer", "ratio_to_base", "ratio_low", "ratio_high", "best"]
    found, expected = (tables_d.equal_cost({"runs": table}, base="base") for table in (runs, without))
    pd.testing.assert_frame_equal(found.query("lr == 0.1")[columns].reset_index(drop=True), expected[columns])


def test_equal_cost_interval_is_students():
    table = tables_d.equal_cost({"runs": made_up_runs()}, base="base").set_index("optimizer")
    logs = [-(0.2 - 0.1) * (1 + 0.1 * seed) * 10 for seed in range(3)]
    assert table.loc["ours", "ratio_to_base"] == pytest.approx(np.exp(np.mean(logs)))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(logs), scale=stats.sem(logs))
    assert table.loc["ours", "ratio_low"] == pytest.approx(np.exp(low))
    assert table.loc["ours", "ratio_high"] == pytest.approx(np.exp(high))
    assert table["best"].to_dict() == {"ours": True, "base": True, "wild": False}
    assert table.loc["wild", "diverged"] == 1
    means = ["ratio_to_base", "ratio_low", "train_loss_mean", "train_loss_sd", "val_accuracy_mean"]
    assert table.loc["wild", means].isna().all(), "the seed that is left would flatter"
