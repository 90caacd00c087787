"""Paper B's figures on made-up tables: what is drawn is what the tables hold, and each states its scale."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from papers.b import figures as paper_b
from papers.b import figures_spectra as spectra_b
from papers.b import figures_toy as toy_b
from papers.b.measures_toy import toy_model
from papers.b.tables import in_order
from papers.common.context import Context
from papers.common.style import Style

K, P = 3, 1234
IDENTITY = {"dataset": "made-up", "model": "net", "optimizer": "sgd", "batch_size": 8, "lr": 0.1, "seed": 0}
SCALE = {"parameters": P, "examples": 77, "batch_norm": "batch"}


@pytest.fixture(scope="module")
def trajectory() -> pd.DataFrame:
    random, rows = np.random.default_rng(0), []

    def add(step, quantity, index, value, **rest):
        rows.append({"step": step, "quantity": quantity, "index": index, "value": value, **rest})

    for step in (0, 10, 20):
        for name in ("f_top", "f_next", "f_class", "class_overlap"):
            add(step, name, K, random.uniform(), null=K / P, random=0.001 * random.uniform())
        add(step, "hg_overlap", 0, 0.9, random=0.01)
        add(step, "vertex_overlap", K, 0.87)
        for name in ("loss", "accuracy"):
            add(step, name, 0, random.uniform())
        for i in range(1, 2 * K + 1):
            add(step, "eigenvalue", i, 10.0 / i)
            add(step, "c2", i, random.uniform() / 10, null=1 / P)
        for start in (0, 10):
            if start < step:
                for d in (2, 3, 4):
                    add(step, "top_overlap", d, random.uniform(), start_step=start, null=d / P)
                add(step, "next_overlap", K, random.uniform(), start_step=start, null=K / P)
    return pd.DataFrame(rows).assign(**IDENTITY, **SCALE)


def texts(figure) -> str:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_title(loc="left")]
    return "\n".join(found)


@pytest.mark.parametrize(
    ("function", "networks", "quantities"),
    [
        (paper_b.f_top_with_training, 3, {"f_top", "f_next", "loss", "accuracy"}),
        (paper_b.subspace_overlaps, 3, {"top_overlap", "next_overlap"}),
        (paper_b.largest_eigenvalue, 2, {"eigenvalue"}),
        (paper_b.f_top_under_changes, 6, {"f_top"}),
        (paper_b.nulls, 3, {"f_top", "f_next", "f_class", "class_overlap", "hg_overlap", "vertex_overlap"}),
    ],
)
def test_figures_along_training_draw_their_quantities(trajectory, function, networks, quantities):
    tables = {f"network {i}": trajectory for i in range(networks)}
    figure, drawn = function(tables, Style())
    assert set(drawn["quantity"]) == quantities
    expected = trajectory[trajectory["quantity"].isin(quantities)]
    if function is paper_b.largest_eigenvalue:
        expected = expected[expected["index"] == 1]
    if function is paper_b.subspace_overlaps:
        expected = expected[expected["index"] == K]
    assert sorted(drawn["value"]) == pytest.approx(sorted([*expected["value"]] * networks))
    assert f"P = {P:,}, 77 examples" in texts(figure)


def test_lines_hold_the_values_from_the_start_on(trajectory):
    figure, _ = paper_b.subspace_overlaps({"fc": trajectory}, Style())
    line = figure.axes[0].lines[1]  # t1 = 10: one later step
    value = trajectory.query("quantity == 'top_overlap' and index == @K and start_step == 10")["value"].item()
    assert list(line.get_xdata()) == [10, 20]
    assert list(line.get_ydata()) == [1.0, value]


def test_mean_overlap_is_over_later_steps(trajectory):
    figure, drawn = paper_b.overlap_by_dimension({"fc": trajectory}, Style())
    rows = trajectory.query("quantity == 'top_overlap' and index == 2 and start_step == 0")
    assert len(rows) == 2
    found = drawn.query("start_step == 0 and dimension == 2")["value"].item()
    assert found == pytest.approx(rows["value"].mean())
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert marks == [K - 1]


def test_panels_of_dimensions_and_of_steps(trajectory):
    figure, drawn = paper_b.overlaps_of_dimensions({"fc": trajectory}, Style(), dimensions=[2, 4])
    assert set(drawn["index"]) == {2, 4}
    figure, drawn = paper_b.gradient_by_eigenvector({"fc": trajectory}, Style(), steps=[0, 20])
    assert len(drawn) == 2 * 2 * K
    total = trajectory.query("quantity == 'c2' and step == 20 and index <= @K")["value"].sum()
    assert f"step 20: Σ₁…ₖ = {total:.2f}" in texts(figure)


def test_inputs_are_put_in_order():
    empty = pd.DataFrame()
    assert list(in_order({"a": empty, "b": empty, "c": empty}, ["c", "a"])) == ["c", "a", "b"]
    with pytest.raises(KeyError, match="d"):
        in_order({"a": empty}, ["d"])


def spectrum_table(values: list[float], density: bool) -> pd.DataFrame:
    rows = [{"quantity": "eigenvalue", "index": i, "eigenvalue": v, "value": 0.0} for i, v in enumerate(values, 1)]
    if density:
        grid = np.linspace(-1, 10, 50)
        rows += [{"quantity": "density", "index": i, "eigenvalue": x, "value": 0.1} for i, x in enumerate(grid)]
    return pd.DataFrame(rows).assign(**IDENTITY, **SCALE, classes=3, step=9, accuracy=0.5, method="m")


def test_spectra_number_what_stands_out():
    tables = {
        "true labels": spectrum_table([9, 8, 7, 0.2, 0.1], True),
        "even/odd": spectrum_table([9, 8, 0.2, 0.1], False),
    }
    figure, drawn = spectra_b.spectra(tables, Style(), order=["true labels", "even/odd"])
    assert "true labels: 3 stand out" in figure.axes[0].get_title()
    assert "even/odd: 2 stand out" in figure.axes[1].get_title()
    assert [t.get_text() for t in figure.axes[0].texts] == ["1", "2", "3"]
    assert drawn.groupby("labels")["outliers"].first().to_dict() == {"true labels": 3, "even/odd": 2}


def test_right_edge_is_a_density_with_the_kth_marked():
    random = np.random.default_rng(1)
    parts = []
    for seed in (0, 1):
        values = np.sort(random.lognormal(size=40))[::-1]
        part = pd.DataFrame({"index": range(1, 41), "eigenvalue": values})
        parts.append(part.assign(**{**IDENTITY, "seed": seed}, **SCALE, classes=K))
    table = pd.concat(parts)
    _, drawn = spectra_b.right_edge({"edge": table}, Style())
    assert ((drawn["high"] - drawn["low"]) * drawn["density"]).sum() == pytest.approx(1.0)
    assert drawn["mark"].iloc[0] == pytest.approx(np.log10(table.loc[table["index"] == K, "eigenvalue"]).mean())


def test_eigenvector_figures_show_their_steps():
    rows = []
    for step in (0, 5, 9):
        entry = 0
        for rank, (name, layer, part, size) in enumerate(
            [
                ("0.weight", 1, "weight", 6),
                ("0.bias", 1, "bias", 2),
                ("2.weight", 2, "weight", 4),
                ("2.bias", 2, "bias", 2),
            ]
        ):
            for _ in range(size):
                where = {"tensor": name, "tensor_rank": rank, "layer": layer, "part": part, "tensor_size": size}
                rows.append({"step": step, **where, "tensor_norm": 0.1 * step, "entry": entry, "value": 0.1 * entry})
                entry += 1
    table = pd.DataFrame(rows).assign(**IDENTITY, **{**SCALE, "parameters": 14}, eigenvalue=2.0)
    figure, drawn = spectra_b.eigenvector_entries({"entries": table}, Style())
    assert len(drawn) == len(table)
    assert "entries shown" not in figure.get_suptitle(), "all entries are there"
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4, "a tensor has one entry for all steps"
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes[:3]] == [
        [n] * 4 for n in ("0.00", "0.50", "0.90")
    ]
    _, drawn = spectra_b.last_layer_entries({"entries": table}, Style())
    assert set(drawn["step"]) == {0, 9}
    assert set(drawn["tensor"]) == {"2.weight", "2.bias"}


def test_learning_figure_smooths_the_minibatch_loss():
    steps = np.arange(0, 61)
    runs = [
        pd.DataFrame({"step": steps, "train_loss": np.where(steps == 0, np.nan, 100.0 / (steps + 1))}).assign(
            **{**IDENTITY, "optimizer": name}, val_accuracy=np.where(steps % 20 == 0, 0.5, np.nan)
        )
        for name in ("sgd", "bulk", "dominant")
    ]
    _, drawn = paper_b.dominant_and_bulk({"runs": pd.concat(runs)}, Style(), window=5)
    loss = drawn.query("quantity == 'train_loss' and optimizer == 'sgd'").set_index("step")["median"]
    assert loss[40] == pytest.approx(np.mean([100.0 / (s + 1) for s in range(36, 41)]))
    assert (drawn["quantity"] == "val_accuracy").sum() == 3 * 4


def test_no_figure_of_paper_b_imports_torch():
    import subprocess

    modules = "papers.b.figures, papers.b.figures_spectra, papers.b.figures_toy"
    code = f"import {modules}, papers.b.tables, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_stands_out_is_marked_in_a_histogram_of_all_eigenvalues_too():
    tables = {"true labels": spectrum_table([9, 8, 7, *(0.001 * i for i in range(100, 0, -1))], False)}
    axis = spectra_b.spectra(tables, Style())[0].axes[0]
    low, high = axis.get_ylim()
    (marks,) = [line for line in axis.lines if line.get_marker() == "|"]
    assert list(marks.get_xdata()) == [9, 8, 7]
    assert all(low < y < high for y in [*marks.get_ydata(), *(text.xy[1] for text in axis.texts)])


def test_the_toy_figure_says_how_many_classes_its_first_case_has():
    cases = [{"classes": 3}, {"classes": 2, "sigma": 0.01}, {"classes": 2, "orthonormal": False, "bias": True}]
    table = toy_model(Context(show_progress=False), cases=cases, times=[1, 4], dimension=9, per_class=2)
    figure, _ = toy_b.toy_model({"toy": table}, Style())
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "measured, k = 3" in labels


@pytest.mark.parametrize(
    ("case", "empty"),
    [({"sigma": 0.1}, [0, 1, 2, 4, 5]), ({"bias": True}, [0, 1, 2, 3, 5]), ({"orthonormal": False}, [0, 1, 3, 4])],
)
def test_the_toy_figure_is_drawn_of_any_case_alone(case, empty):
    table = toy_model(
        Context(show_progress=False), cases=[{"classes": 3, **case}], times=[1, 4], dimension=9, per_class=2
    )
    figure, _ = toy_b.toy_model({"toy": table}, Style())
    said = [number for number, axes in enumerate(figure.axes) if axes.texts]
    assert said == empty
