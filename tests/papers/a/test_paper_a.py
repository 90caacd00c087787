"""Paper A's measures against direct computations, its tables and figures on made-up runs."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from curvspace import class_gradients
from curvspace.errors import UserError
from curvspace.training.run import train
from curvspace.training.spec import RunSpec
from papers.a import figures
from papers.a import measures as paper_a
from papers.a import study as study_a
from papers.a import tables as tables_a
from papers.a.study import PUBLISHED
from papers.common.context import Context
from papers.common.style import Style


@pytest.fixture(scope="module")
def context(digits_dir, tmp_path_factory):
    spec = RunSpec.from_dict(
        {
            "dataset": {"name": "digits", "source": "digits", "train": 400, "validation": 100},
            "model": {"name": "fc", "kind": "fc", "widths": [8]},
            "optimizer": {"name": "sgd", "kind": "sgd", "momentum": 0.9},
            "task": {"epochs": 6, "checkpoints": [0]},
            "batch_size": 50,
            "lr": 0.1,
        }
    )
    run = train(spec, digits_dir, tmp_path_factory.mktemp("a") / "run", progress=False)
    return Context(runs=[run], data_dir=digits_dir.parent, show_progress=False)


def test_other_losses_than_the_cross_entropy_are_refused(context):
    (run,) = context.runs
    trained = copy.copy(run)
    trained.spec = {**run.spec, "task": {**run.spec["task"], "loss": "mse"}}
    other = Context(runs=[trained], data_dir=context.data_dir, show_progress=False)
    for measure in (partial(paper_a.spectrum, k=2), paper_a.diagnosis):
        with pytest.raises(UserError, match=r"cross_entropy; tasks\.digits/fc\.loss is 'mse'"):
            measure(other, examples=10)


def test_eq_12_against_a_loop_over_examples():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 2, (20,))
    c, _ = class_gradients(model, x, y, num_classes=3)
    expected = torch.zeros(3, dtype=torch.float64)
    for xi, yi in zip(x, y, strict=True):
        p = torch.softmax(model(xi), 0)[yi].item()
        expected[yi] += p * (1 - p) / 20 * (c[yi] @ c[yi])
    torch.testing.assert_close(paper_a.eq12_eigenvalues(model, x, y, c), expected, rtol=1e-12, atol=1e-14)
    assert expected[2] == 0, "a class without examples has no curvature"


def test_spectrum_is_that_of_the_dense_hessian(context):
    table = paper_a.spectrum(context, k=6, examples=100, tol=1e-6)
    (run,) = context.runs
    data = context.dataset(run)
    model = context.model(run, run.steps[-1])
    x, y = paper_a.training_batch(data, 100)
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(x.to(torch.float32)), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [
        torch.cat([h.flatten() for h in torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)])
        for g in gradient
    ]
    dense = torch.linalg.eigvalsh(torch.stack(rows).double()).flip(0)[:6]
    np.testing.assert_allclose(table["eigenvalue"], dense, rtol=1e-4)
    assert table["converged"].all()


def test_rank_of_the_union_counts_singular_values(context):
    table = paper_a.span_along_training(context, minibatch=100, examples=200, tolerances=[1e-6, 0.999], tol=1e-3)
    ranks = table[table["quantity"] == "rank"]
    assert set(ranks["step"]) == set(context.runs[0].steps)
    assert (ranks.loc[ranks["tolerance"] == 1e-6, "value"] == 21).all(), "10 + 11 generic vectors are independent"
    assert (ranks.loc[ranks["tolerance"] == 0.999, "value"] == 1).all()
    profile = table[(table["quantity"] == "singular value") & (table["step"] == 0)]["value"]
    assert profile.is_monotonic_decreasing
    assert (profile**2).sum() == pytest.approx(21, rel=1e-5), "unit columns: the squares add up to their number"


def test_cosines_mark_one_eigenvector_a_class(context):
    table = paper_a.cosines(context, examples=200)
    assert len(table) == 100
    assigned = table[table["assigned"]]
    assert assigned["class"].is_unique
    assert assigned["index"].is_unique
    assert assigned["cosine"].mean() == pytest.approx(table["mean_cosine"].iloc[0])
    assert table["null"].iloc[0] < table["mean_cosine"].iloc[0]


def test_diagnosis_against_dense_matrices(context):
    table = paper_a.diagnosis(context, examples=60, trace_products=60, tol=1e-4)
    step = context.runs[0].steps[-1]
    part = table[table["step"] == step].set_index("quantity")
    model = context.model(context.runs[0], step)
    x, y = paper_a.training_batch(context.dataset(context.runs[0]), 60)
    x = x.float()
    c, _ = class_gradients(model, x, y, num_classes=10)
    v = (c / c.norm(dim=1, keepdim=True)).T
    z = model(x)
    rows = [torch.autograd.grad(z[n, k], model.parameters(), retain_graph=True) for n in range(60) for k in range(10)]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).reshape(60, 10, -1)
    p = z.softmax(1).detach()
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("nkp,nkl,nlq->pq", jacobian, outer, jacobian) / 60
    np.testing.assert_allclose(part.loc["curvature", "value"], torch.diag(v.T @ dense @ v), rtol=1e-3)
    values = torch.linalg.eigvals(
        dense @ v @ torch.diag(1 / torch.tensor(part.loc["lambda", "value"].to_numpy()).float()) @ v.T
    )
    assert part.loc["newton step", "value"] == pytest.approx(float(values.real.max()), rel=1e-3)
    q, _ = torch.linalg.qr(v)
    share = torch.trace(q.T @ dense @ q) / torch.trace(dense)
    assert part.loc["share of trace G", "value"] == pytest.approx(float(share), rel=0.1)
    ratio = part.loc["lambda", "value"].to_numpy() / part.loc["curvature", "value"].to_numpy()
    np.testing.assert_allclose(part.loc["ratio", "value"], ratio)


def test_further_seeds_of_some_optimisers_are_those_of_no_other():
    newton = {"newton": {"method": "average", "heavy-method": "heavy"}}
    also = {"optimizers": ["method", "average"], "seeds": [1, 2]}
    one = {"dataset": "d", "model": "m", "seeds": [0]}
    rates = one | {"batch_size": 8, "lrs": [0.1, 0.01], "diverging_lrs": [1.0], "also": also | {"lrs": [0.1]}}
    table = study_a._learning_rates(newton | {"learning_rates": rates})
    for artefact in table[:3]:
        seeds = Counter(run.optimizer for run in artefact.inputs["runs"] if run.lr == 0.1)
        assert seeds == {"method": 3, "average": 3, "heavy": 1, "heavy-method": 1}, artefact.id
        assert all(run.lr == 0.1 for run in artefact.inputs["runs"] if run.seed)
    sizes = one | {"lr": 0.01, "sizes": [8], "also": also | {"sizes": [16]}}
    (figure,) = study_a._batch_sizes(newton | {"batch_sizes": sizes})
    assert {run.optimizer for run in figure.inputs["runs"] if run.batch == 16} == {"method", "average"}
    assert len(figure.inputs["runs"]) == 4 + 4


def test_diagnosis_of_several_seeds_is_a_measure_each_and_one_line(context):
    block = {"dataset": "d", "model": "m", "optimizer": "sgd", "batch_size": 64, "lr": 0.1, "seed": 0, "examples": 60}
    artefact = study_a._diagnosis({"diagnosis": [block, block | {"seed": 1}, block | {"seed": 2}]})
    assert len({measure.name for measure in artefact.inputs["measure"]}) == 3
    one = paper_a.diagnosis(context, examples=60, trace_products=12, tol=1e-2)
    parts = [one.assign(seed=seed, value=one["value"] * factor) for seed, factor in enumerate((1.0, 0.5, 0.75))]
    figure, _ = figures.diagnosis({"measure": pd.concat(parts)}, Style())
    (line,) = [line for line in figure.axes[2].lines if line.get_label() == "|g|²"]
    shares = one[one["quantity"] == "share of gradient"]
    np.testing.assert_array_equal(line.get_xdata(), shares["step"])
    np.testing.assert_allclose(line.get_ydata(), 0.75 * shares["value"])


def test_a_class_that_is_absent_leaves_the_others_their_numbers(context, monkeypatch):
    def without_class_3(data, examples):
        keep = data.train.targets != 3
        return data.normalise(data.train.inputs[keep][:examples]), data.train.targets[keep][:examples]

    monkeypatch.setattr(paper_a, "training_batch", without_class_3)
    table = paper_a.diagnosis(context, examples=60, trace_products=12, steps=[0])
    assert table.loc[table["quantity"] == "ratio", "index"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def runs(curves: dict[str, list[float]], batch_size: int = 64) -> pd.DataFrame:
    rows = [
        {"dataset": "d", "model": "m", "optimizer": name, "batch_size": batch_size, "lr": 0.1, "seed": 0}
        | {"step": 10 * i, "epoch": i / 2, "eval_train_loss": loss, "val_loss": loss, "val_accuracy": 1 / (1 + loss)}
        | {"train_loss": loss if i else np.nan}
        for name, losses in curves.items()
        for i, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("newton", "starts_faster", "crossover"),
    [
        ([2.0, 1.0, 0.9, 0.8], True, 20),  # leads at step 10, overtaken at 20
        ([2.0, 1.0, 0.4, 0.1], True, np.nan),  # leads to the end
        ([2.0, 1.9, 1.8, 1.7], False, np.nan),  # never leads
        ([2.0, 1.0], True, 20),  # diverges after a lead
    ],
)
def test_crossover(newton, starts_faster, crossover):
    table = runs({"sgd": [2.0, 1.5, 0.7, 0.3], "newton": newton})
    found = tables_a.crossovers(table, "sgd", "newton").iloc[0]
    assert found["starts_faster"] == starts_faster
    np.testing.assert_equal(found["crossover_step"], crossover)
    assert found["steps_per_epoch"] == 20


def test_a_run_that_diverges_does_not_overtake():
    table = runs({"sgd": [2.0, 1.9, 0.7], "newton": [2.0, 1.0, 0.9, 0.8]})
    assert np.isnan(tables_a.crossovers(table, "sgd", "newton").iloc[0]["crossover_step"])


@pytest.mark.parametrize(
    ("newton", "crossover"),
    [
        # the mean over seeds: 1.2, 3.5 at steps 10 and 20, SGD's 1.5, 0.7; one of three seeds is far off
        ([[2.0, 1.0, 0.6, 0.5], [2.0, 1.0, 0.6, 0.5], [2.0, 1.6, 9.3, 9.9]], 30),
        # two of three diverge, at the third evaluation
        ([[2.0, 1.0, 0.6, 0.5], [2.0, 1.0], [2.0, 1.0]], 20),
        ([[2.0, 1.0, 0.6, 0.1], [2.0, 1.0, 0.6, 0.1], [2.0, 1.0]], np.nan),
    ],
)
def test_a_crossover_of_several_seeds_is_that_of_the_medians(newton, crossover):
    curves = [runs({"sgd": [2.0, 1.5, 0.7, 0.3], "newton": one}).assign(seed=seed) for seed, one in enumerate(newton)]
    found = tables_a.crossovers(pd.concat(curves), "sgd", "newton").iloc[0]
    np.testing.assert_equal(found["crossover_step"], crossover)


def test_an_optimiser_that_was_not_run_starts_neither_faster_nor_slower():
    found = tables_a.crossovers(runs({"sgd": [2.0, 1.5]}), "sgd", "newton")
    assert found["starts_faster"].isna().all()


@pytest.mark.parametrize("minibatch", [230.1, np.inf, np.nan])
def test_a_run_whose_minibatch_loss_blew_up_diverged_whatever_the_network_is_then(minibatch):
    """After the step that ended it every unit may be off: the loss is that of a guess."""
    table = runs({"sgd": [2.3, 1.0], "newton": [2.3, 2.3]})
    table.loc[(table["optimizer"] == "newton") & (table["step"] > 0), "train_loss"] = minibatch
    ends = tables_a.divergence({"runs": table}).set_index("optimizer")["diverged"]
    assert ends.to_dict() == {"sgd": False, "newton": True}


def test_a_mean_loss_counts_the_run_that_has_none():
    lost = runs({"sgd": [2.0, np.nan]}).assign(seed=1)
    table = tables_a.loss_by_lr({"runs": pd.concat([runs({"sgd": [2.0, 1.0]}), lost])}, PUBLISHED)
    assert table["loss_mean"].tolist() == [np.inf]
    assert table["diverged"].tolist() == [1]


def test_tables_say_who_diverged():
    table = runs({"sgd": [2.0, 1.0], "class-gradient-newton": [2.0, 1e6]})
    accuracy = tables_a.accuracy_by_lr({"runs": table}, PUBLISHED).set_index("optimizer")
    assert accuracy.loc["sgd", "accuracy_percent_mean"] == pytest.approx(50)
    assert accuracy.loc["sgd", "paper_accuracy_percent"] == 88
    assert accuracy["diverged"].to_dict() == {"class-gradient-newton": 1, "sgd": 0}
    ends = tables_a.divergence({"runs": table}).set_index("optimizer")
    assert ends.loc["class-gradient-newton", "best_val_loss"] == 2.0


@pytest.mark.parametrize("end", [300.0, np.nan, 1.1])
def test_a_seed_that_diverges_between_two_evaluations_does_not_break_the_line_of_the_others(end):
    whole = [runs({"sgd": [2.0, 1.5, 0.7, 0.3]}).assign(seed=seed) for seed in (0, 1)]
    lost = runs({"sgd": [2.0, 1.4]}).assign(seed=2)
    row = lost.tail(1).assign(step=13, epoch=0.65, val_loss=end, eval_train_loss=end)
    table = pd.concat([*whole, lost, row], ignore_index=True)
    figure, drawn = figures.loss_over_training({"runs": table}, Style())
    assert drawn["epoch"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert drawn["median"].tolist() == [2.0, 1.5, 0.7, 0.3]
    assert drawn["n"].tolist() == [3, 3, 3, 2]
    assert np.isfinite(figure.axes[0].lines[0].get_ydata()).all()
    alone = figures.known_or_diverged(pd.concat([lost, row], ignore_index=True), "val_loss")
    assert alone["step"].tolist() == [0, 10, 13], "a run without others stays where it ended"


def test_an_optimiser_with_fewer_seeds_says_how_many():
    seeds = [runs({"sgd": [2.0, 1.5, 0.7], "newton": [2.0, 1.0, 0.9]}).assign(seed=seed) for seed in (0, 1)]
    table = pd.concat([*seeds, runs({"other": [2.0, 1.8, 1.7]}).assign(seed=0)], ignore_index=True)
    figure, _ = figures.loss_over_training({"runs": table}, Style())
    assert figure.axes[0].get_legend_handles_labels()[1] == ["sgd", "newton", "other (1 seed)"]
    assert figure.axes[0].get_title().endswith("2 seeds")


def test_figures_draw_what_they_are_given(context):
    style = Style()
    table = runs({"sgd": [2.0, 1.5, 0.7], "newton": [2.0, 1.0, 0.9]})
    figure, drawn = figures.loss_by_batch_size({"runs": table}, style, pairs={"newton": "sgd"})
    assert "crossover at epoch" in figure.axes[0].get_title()
    assert set(drawn["optimizer"]) == {"sgd", "newton"}
    figure, drawn = figures.loss_over_training({"runs": table}, style)
    assert drawn[drawn["optimizer"] == "sgd"]["median"].tolist() == [2.0, 1.5, 0.7]
    measure = paper_a.diagnosis(context, examples=60, trace_products=12, tol=1e-2)
    figure, drawn = figures.diagnosis({"measure": measure}, style)
    assert len(figure.axes) == 4
