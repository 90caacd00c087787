"""Paper D's figures from made-up tables: what is drawn is what the tables say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from papers.common.style import Style, save
from papers.d import figures as paper_d

RUN = {"dataset": "d", "model": "m", "optimizer": "o", "batch_size": 1, "lr": 0.1, "seed": 0, "examples": 10}


def spectrum_table() -> pd.DataFrame:
    rows = [
        {"step": step, "end": end, "index": index, "eigenvalue": value * (1 + step), "subset_loss": 1.0 / (1 + step)}
        for step in (0, 5, 10)
        for end, index, value in (("LA", 1, 4.0), ("LA", 2, 2.0), ("SA", 1, -0.5))
    ]
    return pd.DataFrame([RUN | row for row in rows])


def directions_table() -> pd.DataFrame:
    rows = []
    for step in (5, 10):
        for i, (kind, value) in enumerate((("LA", 4.0), ("LA", 1.0), ("SA", -0.5), ("SA", -0.2), ("random", 0.01))):
            row = {"step": step, "kind": kind, "index": i + 1, "curvature": value, "inverse_alpha": 1.1 * value}
            row |= {"improvement": 0.01 * (i + 1), "improves": True, "at_edge": kind == "SA", "search_radius": 2.0}
            row |= {f"fit_{name}_{radius}": value + 0.1 for name in ("scaled", "unit") for radius in ("0.1", "1")}
            rows.append(row)
    return pd.DataFrame([RUN | row for row in rows])


def runs_table() -> pd.DataFrame:
    rows = [
        {"optimizer": name, "seed": seed, "step": step, "gradient_evaluations": cost * step or np.nan}
        | {"eval_train_loss": np.exp(-rate * step * (1 + 0.1 * seed)), "val_accuracy": 0.5, "wall_s": float(step)}
        for name, rate, cost in (("base", 0.1, 1), ("ours", 0.3, 2))
        for seed in (0, 1)
        for step in (0, 5, 10)
    ]
    return pd.DataFrame([RUN | row for row in rows])


def estimate_table() -> pd.DataFrame:
    columns = {"estimate": -0.1, "curvature": -0.05, "eigenvalue": -0.5, "cosine": 0.1, "share": 0.02}
    columns |= {"null_cosine": 0.01, "null_share": 1e-4, "bottom": 3, "minibatch_eigenvalue": -2.0}
    return pd.DataFrame([RUN | {"step": step} | columns for step in (5, 10)])


def fixed_table() -> pd.DataFrame:
    rows = [
        {"step": step, "end": end, "origin_step": origin, "curvature": float(step)}
        for end, origin in (("LA", 5), ("LA", 10), ("SA", 5))
        for step in (0, 5, 10)
    ]
    return pd.DataFrame([RUN | row for row in rows])


def profile_table() -> pd.DataFrame:
    rows = [
        {"step": 5, "end": end, "eigenvalue": value, "slope": 0.1, "reading": reading, "radius": radius, "alpha": alpha}
        | {"loss": 1 + alpha**2, "quadratic": 1 + 0.5 * value * alpha**2}
        for end, value in (("LA", 2.0), ("SA", -1.0))
        for reading in ("eq. 1", "unit")
        for radius in (0.1, 1.0)
        for alpha in np.linspace(-radius, radius, 5)
    ]
    return pd.DataFrame([RUN | row for row in rows])


CASES = {
    "spectrum": ({"spectrum": spectrum_table()}, {}, 1),
    "fixed_directions": ({"directions": fixed_table(), "spectrum": spectrum_table()}, {}, 4),
    "profiles": ({"profiles": profile_table()}, {}, 8),
    "large_scale_curvature": ({"directions": directions_table()}, {"radii": [0.1, 1.0]}, 4),
    "inverse_step": ({"directions": directions_table()}, {}, 2),
    "improvement": ({"directions": directions_table()}, {}, 3),
    "kinds_of_direction": ({"directions": directions_table()}, {"radius": 0.1}, 2),
    "optimizer": ({"runs": runs_table(), "estimate": estimate_table()}, {"base": "base"}, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_each_figure_is_drawn_and_saved(name, tmp_path):
    tables, options, panels = CASES[name]
    style = Style()
    with style.applied():
        figure, drawn = getattr(paper_d, name)(tables, style, **options)
        assert isinstance(figure, Figure)
        assert len(figure.axes) == panels
        assert len(drawn)
        for path in save(figure, drawn, tmp_path / name, dpi=50):
            assert path.stat().st_size > 0


def points(axis) -> set[tuple[float, float]]:
    return {(x, y) for line in axis.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}


def test_the_negative_eigenvalue_is_drawn_by_its_size():
    figure, _ = paper_d.spectrum({"spectrum": spectrum_table()}, Style())
    assert {(0, 0.5), (5, 3.0), (10, 5.5), (10, 44.0)} <= points(figure.axes[0])


def test_best_steps_at_the_end_of_the_range_are_hollow():
    figure, _ = paper_d.inverse_step({"directions": directions_table()}, Style())
    hollow = [line for line in figure.axes[1].lines if line.get_markerfacecolor() == "none"]
    assert {tuple(line.get_xdata()) for line in hollow} == {(-0.5, -0.2)}


def test_hollow_points_have_the_colour_of_their_step():
    table = directions_table()
    table["at_edge"] &= table["step"] == 10
    lines = paper_d.inverse_step({"directions": table}, Style())[0].axes[1].lines
    (hollow,) = (line for line in lines if line.get_markerfacecolor() == "none")
    by_label = {line.get_label(): line.get_color() for line in lines}
    assert hollow.get_color() == by_label["10"] != by_label["5"]


def test_a_rank_correlation_says_how_many_directions_it_is_of():
    table = directions_table()
    table.loc[(table["step"] == 5) & (table["kind"] == "SA"), "inverse_alpha"] = np.nan  # no gain, no best step
    title = paper_d.inverse_step({"directions": table}, Style())[0].axes[1].get_title()
    assert "negative λ: rank correlation nan (n = 2)" in title
    assert "(n = 4)" in title


def test_only_eigenvectors_count_in_the_totals():
    figure, drawn = paper_d.improvement({"directions": directions_table()}, Style())
    assert set(drawn["kind"]) == {"LA", "SA"}
    heights = [y for _, y in points(figure.axes[2])]
    for total in (0.03, 0.07):
        assert np.isclose(heights, total).any()
