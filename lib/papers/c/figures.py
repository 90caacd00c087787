"""Figures of paper C: pure functions from tidy tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.c.tables import ROWS, best_settings
from papers.common.runs import Tables
from papers.common.style import Style, below, legend_below, rate

LABELS = {
    "curveball": "CurveBall, λ adapted",
    "curveball-fixed-damping": "CurveBall, λ fixed",
    "sgd": "SGD + momentum",
    "adam": "Adam",
    "kfac": "K-FAC",
}


def trajectories(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """C-F1: the first run of each solver on the Rosenbrock problems: path over the noiseless function; its value."""
    everything = tables["small"]
    drawn = everything[
        (everything["stage"] == "trajectory")
        & (everything["run"] == 0)
        & (everything["solver"] != "curveball-searched")
    ]
    problems = list(drawn["problem"].unique())
    figure, axes = style.panels(len(problems), 2)
    colours = style.colours(ROWS)
    for row, problem in zip(axes, problems, strict=True):
        part = drawn[drawn["problem"] == problem]
        _contours(row[0])
        for solver, path in part.groupby("solver", sort=False):
            line = {"label": ROWS[str(solver)], "color": colours[solver]}
            row[0].plot(path["u"], path["v"], marker=".", markersize=3, linewidth=0.9, **line)
            row[1].plot(path["iteration"] + 1, path["objective"], **line)
        row[0].plot(1, 1, marker="*", color="black", markersize=9)
        row[0].set(xlim=(-2, 2), ylim=(-1, 3), xlabel="u", ylabel="v", title=f"Rosenbrock, {problem}")
        row[1].axhline(part["tolerance"].iloc[0], color="0.4", linestyle=":", linewidth=1)
        row[1].set(xscale="log", yscale="log", ylim=(1e-6, 1e3), xlabel="iteration + 1", ylabel="objective at ε = 1")
    legend_below(figure)
    return figure, drawn.dropna(axis=1, how="all").drop(columns=["stage"])


def _contours(axis: Axes) -> None:
    u, v = np.meshgrid(np.linspace(-2, 2, 120), np.linspace(-1, 3, 120))
    value = np.log10((1 - u) ** 2 + 100 * (v - u**2) ** 2 + 1e-3)
    axis.contourf(u, v, value, levels=12, cmap="Greys", alpha=0.5)
    axis.grid(False)


def training_error(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """C-F2, C-F2d: training error against epochs, a panel a network, each optimiser at its best learning rate.

    The axis ends above the errors after the first evaluation, which at the start is that of chance.
    """
    return _error_panels(tables, style, "epoch", "epoch")


def error_by_time(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """C-F3: training error against the seconds spent in steps; evaluation is not counted."""
    return _error_panels(tables, style, "wall_s", "wall-clock (s)")


def _error_panels(tables: Tables, style: Style, x: str, label: str) -> tuple[Figure, pd.DataFrame]:
    columns = min(len(tables), 2)
    figure, axes = style.panels(-(-len(tables) // columns), columns, sharey=True)
    colours = style.colours(dict.fromkeys([*LABELS, *(o for t in tables.values() for o in t["optimizer"])]))
    drawn: list[pd.DataFrame] = []
    for axis, (network, metrics) in zip(axes.flat, tables.items(), strict=False):
        rows = best_settings(metrics).dropna(subset=["eval_train_accuracy"])
        rows = rows.assign(train_error_percent=100 * (1 - rows["eval_train_accuracy"]))
        if x == "wall_s":  # seeds are evaluated at the same steps, not at the same seconds
            keys = ["dataset", "model", "optimizer", "lr", "step"]
            rows = rows.assign(wall_s=rows.groupby(keys)["wall_s"].transform("median"))
        for optimizer, part in rows.groupby("optimizer", sort=False):
            lr = rate(part["lr"].iloc[0], metrics.loc[metrics["optimizer"] == optimizer, "lr"])
            name = f"{LABELS.get(str(optimizer), optimizer)} (η = {lr})"
            band = style.band(axis, part, x, "train_error_percent", label=name, colour=colours[optimizer], marker="o")
            drawn.append(band.assign(network=network, optimizer=optimizer, lr=part["lr"].iloc[0]))
        seeds = metrics["seed"].nunique()
        scale = f"{metrics['dataset'].iloc[0]}, {seeds} seed{'s' * (seeds > 1)}"
        axis.set(xlabel=label, title=f"{network} ({scale})")
        below(axis, fontsize="x-small")
    trained = pd.concat(drawn, ignore_index=True)
    top = trained.loc[trained[x] > trained[x].min(), "high"].max()
    axes.flat[0].set_ylim(0, 1.1 * top if np.isfinite(top) and top > 0 else None)
    for axis in axes[:, 0]:
        axis.set_ylabel("training error (%)")
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    return figure, trained


def rates(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """C-X1: ρ, β, λ and γ through training, a column a network: its first seed, at its best learning rate."""
    quantities = {"rho": "ρ", "beta": "β", "damping": "λ", "ratio": "γ"}
    figure, axes = style.panels(len(quantities), len(tables), height=0.42 * style.width, sharex="col")
    drawn = []
    for column, (network, metrics) in enumerate(tables.items()):
        rows = best_settings(metrics)
        rows = rows[rows["seed"] == rows["seed"].min()].dropna(subset=["rho"])
        for axis, (name, symbol) in zip(axes[:, column], quantities.items(), strict=True):
            values = rows.dropna(subset=[name])
            axis.plot(values["step"], values[name], linewidth=0.8, alpha=0.5)
            smooth = values[name].rolling(max(1, len(values) // 25), center=True, min_periods=1).median()
            axis.plot(values["step"], smooth, color="black", linewidth=1.2)
            low, high = values[name].quantile([0.02, 0.98])
            margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
            axis.set(ylabel=symbol, ylim=(low - margin, high + margin))
        axes[2, column].ticklabel_format(useOffset=False)
        for bound in (0.5, 1.5):
            axes[3, column].axhline(bound, color="0.4", linestyle=":", linewidth=1)
        axes[0, column].set_title(network)
        axes[-1, column].set_xlabel("step")
        drawn.append(rows[["step", *quantities]].assign(network=network))
    return figure, pd.concat(drawn, ignore_index=True)
