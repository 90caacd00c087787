"""Paper B's measures against dense double backward, on a small network trained on real digits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from curvspace.functional import flatten
from curvspace.training.run import train
from curvspace.training.spec import RunSpec
from papers.b import measures as paper_b
from papers.b import measures_spectra as spectra_b
from papers.b import tables as tables_b
from papers.common.context import Context
from tests.unit import oracles

EXAMPLES = 80
CLASSES = 10


def run_context(digits_dir, folder, **changes) -> Context:
    spec = {
        "dataset": {"name": "digits", "source": "digits", "train": 200, "validation": 50, **changes.pop("data", {})},
        "model": {"name": "fc", "kind": "fc", "widths": [3]},
        "optimizer": {"name": "sgd-plain", "kind": "sgd"},
        "task": {"epochs": 5, "checkpoints": [0, 10]},
        "batch_size": 20,
        "lr": 0.1,
    }
    run = train(RunSpec.from_dict({**spec, **changes}), digits_dir, folder / "run", progress=False)
    return Context(runs=[run], data_dir=digits_dir.parent, show_progress=False)


@pytest.fixture(scope="module")
def context(digits_dir, tmp_path_factory):
    return run_context(digits_dir, tmp_path_factory.mktemp("b"))


@pytest.fixture(scope="module")
def dense(context):
    """Gradient, Hessian and eigenvectors (largest first) by double backward in float64, for each checkpoint."""
    (run,) = context.runs
    data = context.dataset(run)
    found = {}
    for step in run.steps:
        model = context.model(run, step).double()
        x, y = data.normalise(data.train.inputs[:EXAMPLES]).double(), data.train.targets[:EXAMPLES]
        hessian = oracles.dense_hessian(model, [(x, y)], "cross_entropy").detach()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        gradient = flatten(torch.autograd.grad(loss, list(model.parameters())))
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        found[step] = (gradient, hessian, values.flip(0), vectors.flip(1))
    return found


@pytest.fixture(scope="module")
def table(context):
    return paper_b.trajectory(
        context, examples=EXAMPLES, batch=30, k=20, starts=[0, 10], dimensions=[2, 5, 20], tol=1e-5
    )


def value(table: pd.DataFrame, step: int, quantity: str, index: int, start: int | None = None) -> float:
    rows = table[(table["step"] == step) & (table["quantity"] == quantity) & (table["index"] == index)]
    rows = rows if start is None else rows[rows["start_step"] == start]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_gradient_shares_eigenvalues_and_overlap(table, dense):
    for step, (g, hessian, values, vectors) in dense.items():
        shares = (vectors.T @ g) ** 2 / (g @ g)
        assert value(table, step, "f_top", CLASSES) == pytest.approx(shares[:10].sum().item(), abs=2e-3)
        assert value(table, step, "f_next", CLASSES) == pytest.approx(shares[10:20].sum().item(), abs=2e-3)
        hg = hessian @ g
        assert value(table, step, "hg_overlap", 0) == pytest.approx((g @ hg / (g.norm() * hg.norm())).item(), abs=1e-4)
        vertex = values[:10].sum() / (10 * (values[:10] ** 2).sum()).sqrt()
        assert value(table, step, "vertex_overlap", CLASSES) == pytest.approx(vertex.item(), abs=1e-3)
        scale = values[0].item()
        for i in (1, 10, 20):
            assert value(table, step, "eigenvalue", i) == pytest.approx(values[i - 1].item(), abs=1e-3 * scale)
        assert value(table, step, "c2", 1) == pytest.approx(shares[0].item(), abs=2e-3)


def test_overlap_of_subspaces_against_projectors(table, dense):
    (_, _, _, first), (_, _, _, later) = dense[10], dense[50]
    for d in (2, 5, 10, 20):
        p, q = first[:, :d] @ first[:, :d].T, later[:, :d] @ later[:, :d].T
        expected = torch.trace(p @ q).item() / d
        assert value(table, 50, "top_overlap", d, start=10) == pytest.approx(expected, abs=5e-3)
    p, q = first[:, 10:20] @ first[:, 10:20].T, later[:, 10:20] @ later[:, 10:20].T
    assert value(table, 50, "next_overlap", 10, start=10) == pytest.approx(torch.trace(p @ q).item() / 10, abs=1e-2)
    assert set(table.loc[table["quantity"] == "top_overlap", "start_step"]) == {0, 10}


def test_every_overlap_has_its_null(table):
    size = int(table["parameters"].iloc[0])
    for quantity in ("f_top", "f_next", "f_class", "class_overlap"):
        rows = table[table["quantity"] == quantity]
        np.testing.assert_allclose(rows["null"], CLASSES / size)
        assert rows["random"].between(0, 0.3).all()
        assert rows["random"].nunique() == len(rows), "drawn anew at each step"
    random = table.loc[table["quantity"] == "hg_overlap", "random"]
    assert (random.abs() < 0.8).all()
    overlap = table[table["quantity"] == "top_overlap"]
    np.testing.assert_allclose(overlap["null"], overlap["index"] / size)


def test_random_subspaces_hold_their_share():
    generator = torch.Generator().manual_seed(0)
    g = torch.ones(60)
    shares = []
    for _ in range(400):
        q = paper_b.random_subspace(60, 6, generator, g)
        shares.append(float((q.T @ g).square().sum() / 60))
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)


def test_steps_beyond_the_run_are_left_out(context):
    table = paper_b.trajectory(context, examples=40, k=10, steps=[10, 50, 4000], tol=0.05)
    assert sorted(table["step"].unique()) == [10, 50]
    with pytest.raises(FileNotFoundError, match="step 7"):
        paper_b.trajectory(context, examples=40, k=10, steps=[7])


def test_overlaps_of_the_last_steps_on_both_splits(context, dense):
    table = paper_b.overlaps(context, examples=EXAMPLES, last=45, splits=["train", "test"])
    assert sorted(zip(table["step"], table["split"], strict=True)) == [
        (10, "test"),
        (10, "train"),
        (50, "test"),
        (50, "train"),
    ]
    g, hessian, *_ = dense[50]
    expected = (g @ hessian @ g / (g.norm() * (hessian @ g).norm())).item()
    found = table[(table["step"] == 50) & (table["split"] == "train")]["hg_overlap"].iloc[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_top_eigenvector_is_listed_entry_by_entry(context, dense):
    table = paper_b.eigenvectors(context, examples=EXAMPLES, steps=[0, 50], tol=1e-6)
    part = table[table["step"] == 50].sort_values("entry")
    v = dense[50][3][:, 0]
    v = v * v[v.abs().argmax()].sign()
    np.testing.assert_allclose(part["value"], v.numpy(), atol=1e-3)
    assert list(part["entry"]) == list(range(len(v)))
    assert list(part.groupby("layer")["part"].unique().map(list)) == [["weight", "bias"]] * 2
    norms = part.groupby("tensor")["tensor_norm"].first()
    assert (norms**2).sum() == pytest.approx(1.0, abs=1e-5)


def test_spectrum_dense_and_by_density_agree(context, dense):
    settings = {"examples": EXAMPLES, "k": 12, "batch": 50}
    exact = spectra_b.spectrum(context, dense_up_to=5000, **settings)
    values = exact.sort_values("index")["eigenvalue"].to_numpy()
    np.testing.assert_allclose(values, dense[50][2].numpy(), atol=1e-5 * values[0])
    sampled = spectra_b.spectrum(context, dense_up_to=10, probes=2, lanczos_steps=30, **settings)
    top = sampled[sampled["quantity"] == "eigenvalue"]
    np.testing.assert_allclose(top["eigenvalue"], values[:12], atol=5e-3 * values[0])
    density = sampled[sampled["quantity"] == "density"]
    assert np.trapezoid(density["value"], density["eigenvalue"]) == pytest.approx(1.0, abs=1e-3)
    assert (exact["classes"] == 10).all()
    edge = spectra_b.edge(context, examples=EXAMPLES, k=5)
    np.testing.assert_allclose(edge["eigenvalue"], values[:5], atol=5e-3 * values[0])


def test_batch_statistics_and_regression(digits_dir, tmp_path):
    from curvspace.datasets import prepare

    options = {"dataset": {"name": "d16", "source": "digits", "train": 60, "validation": 20, "resize": 16}}
    model = {"name": "c", "kind": "convnet", "width": 2, "dense": 8, "batch_norm": True, "dropout": True}
    task = {"epochs": 1, "checkpoints": [0]}
    context = run_context(digits_dir, tmp_path, **options, model=model, task=task)
    tables = {
        state: paper_b.trajectory(context, examples=30, batch=30, k=10, steps=[3], tol=0.1, batch_norm=state)
        for state in ("batch", "running")
    }
    f_top = {state: table[table["quantity"] == "f_top"]["value"].to_numpy() for state, table in tables.items()}
    assert not np.allclose(f_top["batch"], f_top["running"]), "the policy matters and is taken up"
    (run,) = context.runs
    data = context.dataset(run)
    for state, table in tables.items():
        model = context.model(run, 3)
        for layer in model.modules():
            layer.train(state == "batch" and "BatchNorm" in type(layer).__name__)
        (of_loss,) = table.query("quantity == 'accuracy'")["value"]
        x, y = data.normalise(data.train.inputs[:30]), data.train.targets[:30]
        assert of_loss == pytest.approx((model(x).argmax(1) == y).float().mean().item()), state

    prepare("sine", digits_dir.parent / "sine", options={"examples": 100})
    sine = {"dataset": {"name": "sine", "source": "sine", "examples": 100}, "task": {"epochs": 2, "loss": "mse"}}
    (tmp_path / "sine").mkdir()
    spec = {"model": {"name": "fc", "kind": "fc", "widths": [4]}, **sine}
    regression = run_context(digits_dir.parent / "sine", tmp_path / "sine", **spec)
    regression.data_dir = digits_dir.parent
    table = paper_b.overlaps(regression, examples=None, last=5)
    assert table["examples"].tolist() == [100]
    assert table["hg_overlap"].abs().max() <= 1

    (run,) = regression.runs
    data, model = regression.dataset(run), regression.model(run, run.steps[-1])
    p = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [value.numel() for value in p.values()]

    def loss(theta):
        parts = {n: t.view_as(p[n]) for n, t in zip(p, theta.split(sizes), strict=True)}
        outputs = torch.func.functional_call(model, parts, (data.normalise(data.train.inputs),))
        return torch.nn.functional.mse_loss(outputs, data.train.targets.view_as(outputs)) / 2  # one output

    theta = torch.cat([value.flatten() for value in p.values()])
    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(theta)).flip(0)[:2].tolist()
    edge = spectra_b.edge(regression, examples=None, k=2, tol=1e-6)
    assert edge["eigenvalue"].tolist() == pytest.approx(exact, rel=1e-3)


def test_outlier_count_is_the_widest_ratio():
    assert tables_b.outlier_count([9, 8, 7, 0.5, 0.4, 0.3]) == 3
    assert tables_b.outlier_count([0.4, 100, 0.5, -1, 0.3]) == 1
    assert tables_b.outlier_count([8, 7, 6.5, 6, 0.01, 0.009], most=3) == 1, "only so many are looked at"
    with pytest.raises(ValueError, match="positive"):
        tables_b.outlier_count([1.0, -2.0])


def test_tables_put_measured_beside_paper(context, table):
    overlap = paper_b.overlaps(context, examples=EXAMPLES, last=45, splits=["train", "test"])
    row = tables_b.mean_overlaps({"FC": overlap}, paper={"FC": 0.96}).iloc[0]
    train_rows = overlap[overlap["split"] == "train"]
    assert row["overlap"] == pytest.approx(train_rows["hg_overlap"].mean())
    assert (row["paper"], row["checkpoints"], row["seeds"]) == (0.96, 2, 1)
    sums = tables_b.gradient_sums({"fc": table}, [10, 11], [{"step": 10, "sum": "1..k", "value": 0.93}])
    assert sums.loc[(sums["step"] == 10) & (sums["sum"] == "1..k"), "value"].item() == pytest.approx(
        value(table, 10, "f_top", CLASSES), abs=1e-5
    )
    assert sums.loc[sums["step"] == 11, "value"].isna().all(), "a step that was not measured has no sum"
    spectrum = spectra_b.spectrum(context, examples=EXAMPLES)
    counted = tables_b.outliers({"true labels": spectrum}, {"true labels": 10}).iloc[0]
    values = spectrum.sort_values("index")["eigenvalue"].to_numpy()
    assert counted["gap"] == pytest.approx(max(values[:30] / values[1:31]))
    assert counted["gap_at_k"] == pytest.approx(values[9] / values[10])


def test_overlaps_by_epoch_are_what_a_shorter_run_would_have_given(context):
    every = paper_b.overlaps(context, examples=EXAMPLES, last=None)
    assert every["step"].tolist() == context.runs[0].steps == [0, 10, 50]
    assert every["epoch"].tolist() == [0, 1, 5]  # 200 examples, minibatches of 20
    found = tables_b.overlaps_by_epoch({"fc": every}, paper={"fc": 0.96}, last=45)
    assert found["epochs"].tolist() == [1, 5], "the epochs after which there is a checkpoint"
    whole = tables_b.mean_overlaps({"fc": paper_b.overlaps(context, examples=EXAMPLES, last=45)}, paper={})
    assert found["overlap"].iloc[-1] == pytest.approx(whole["overlap"].iloc[0], rel=1e-6)
    assert found["paper"].tolist() == [0.96, 0.96]


def test_overlaps_by_epoch_are_means_over_seeds():
    def table(seed: int, values: list[float]) -> pd.DataFrame:
        steps = [50, 100, 150, 200]
        run = {"dataset": "d", "model": "m", "optimizer": "o", "batch_size": 2, "lr": 0.1, "seed": seed, "examples": 9}
        rows = [
            {**run, "step": s, "epoch": s / 100, "loss": 1.0, "hg_overlap": v}
            for s, v in zip(steps, values, strict=True)
        ]
        return pd.DataFrame(rows)

    both = pd.concat([table(0, [0.1, 0.3, 0.5, 0.9]), table(1, [0.3, 0.5, 0.7, 0.7])])
    found = tables_b.overlaps_by_epoch({"v": both}, paper={}, last=60).set_index("epochs")
    assert found.loc[1, ["overlap", "overlap_min", "overlap_max"]].tolist() == pytest.approx([0.3, 0.2, 0.4])
    assert found.loc[2, ["overlap", "overlap_min", "overlap_max"]].tolist() == pytest.approx([0.7, 0.7, 0.7])
    assert found["seeds"].tolist() == [2, 2]
    assert found["checkpoints"].tolist() == [2, 2]
    assert found["paper"].isna().all()


def test_kink_is_where_the_mean_overlap_is_largest():
    rows = [
        {
            "quantity": "top_overlap",
            "start_step": 5,
            "step": step,
            "index": d,
            "value": 0.8 - 0.05 * abs(d - 4),
            "null": 0,
        }
        for step in (6, 7)
        for d in range(2, 8)
    ]
    rows.append({"quantity": "f_top", "step": 6, "index": 5, "value": 1.0, "null": 0})
    made = pd.DataFrame(rows).assign(dataset="d", model="m", seed=0, parameters=50, examples=10)
    found = tables_b.kink({"fc": made}).iloc[0]
    assert (found["dimension_of_maximum"], found["k_less_1"]) == (4, 4)
    assert found["drop_after"] == pytest.approx(0.1)


def test_close_checkpoints_at_the_start_do_not_outweigh_the_steps_after_them():
    """An overlap of 0 up to step 50, seen four times, and of 1 from there to step 1,000, seen ten times."""
    steps = [0, 10, 25, 50, *range(100, 1001, 100)]
    values = [float(step > 50) for step in steps]
    rows = pd.DataFrame({"step": steps, "epoch": [s / 1000 for s in steps], "hg_overlap": values, "random": values})
    run = {"dataset": "d", "model": "m", "optimizer": "o", "batch_size": 2, "lr": 0.1, "split": "train", "loss": 1.0}
    table = rows.assign(**run, parameters=5, examples=9, batch_norm="batch")
    both = pd.concat([table.assign(seed=0), table[table["step"] >= 100].assign(seed=1)])
    row = tables_b.mean_overlaps({"v": both}, paper={}).iloc[0]
    expected = (950 / 1010 + 1) / 2  # the first checkpoint stands for ten steps, as the second does
    assert row[["overlap", "random"]].tolist() == pytest.approx([expected, expected])
    found = tables_b.overlaps_by_epoch({"v": both}, paper={}, last=1001).iloc[0]
    assert found[["overlap", "overlap_min", "overlap_max"]].tolist() == pytest.approx([expected, 950 / 1010, 1])
