"""Figures of what single steps do in a span and outside it: pure functions from tidy tables."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.common.runs import Tables
from papers.common.style import Style, legend_below

RUN = ["dataset", "model", "optimizer", "step", "span"]
MARKERS = ("o", "s", "^", "D", "v", "P")


def windows(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """X-R7: a column a span; rows: loss hidden by oscillation (M2), signal to noise and memory (M3), steps (M4)."""
    table = window_means(tables)
    spans = list(dict.fromkeys(table["span"]))
    figure, axes = style.panels(4, max(1, len(spans)), height=2.2, sharex=True, sharey="row")
    for column, span in enumerate(spans):
        part = table[table["span"] == span]
        for row, draw in enumerate((_hidden, _signal, _memory, _progress)):
            draw(axes[row, column], part, style)
        size = int(part["size"].iloc[0])
        axes[0, column].set_title(f"{span} ({size} directions)")
        axes[-1, column].set_xlabel("step of training")
    for row, label in enumerate(("loss hidden by\noscillation", "signal / noise", "autocorrelation\nof coordinates")):
        axes[row, 0].set_ylabel(label)
    axes[3, 0].set_ylabel("change of the loss\nby a step")
    legend_below(figure, ncols=2, fontsize="small")
    return figure, table


def window_means(tables: Tables) -> pd.DataFrame:
    """Means over seeds of the windows' rows, with the ratio of the means of signal and noise."""
    numbers = ["size", "loss", "sharpness", "stability", "gain", "gain_whole", "autocorrelation", "signal", "noise"]
    groups = tables["windows"].groupby(RUN, sort=False)
    table = groups[[*numbers, "inside", "outside", "across", "change"]].mean().reset_index()
    return table.assign(snr=table["signal"] / table["noise"], seeds=groups.size().to_numpy())


def _curves(axis: Axes, table: pd.DataFrame, style: Style, column: str, linestyle: str = "-") -> None:
    colours = style.colours(table["optimizer"])
    for marker, (name, own) in zip(itertools.cycle(MARKERS), table.groupby("optimizer", sort=False)):
        label = name if linestyle == "-" else None
        axis.plot(own["step"], own[column], color=colours[name], marker=marker, linestyle=linestyle, label=label)


def _hidden(axis: Axes, table: pd.DataFrame, style: Style) -> None:
    _curves(axis, table, style, "gain")
    axis.axhline(0, color="0.3", linewidth=1)


def _signal(axis: Axes, table: pd.DataFrame, style: Style) -> None:
    _curves(axis, table, style, "snr")
    axis.axhline(1, color="0.3", linewidth=1)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])


def _memory(axis: Axes, table: pd.DataFrame, style: Style) -> None:
    _curves(axis, table, style, "autocorrelation")
    axis.axhline(0, color="0.3", linewidth=1)


def _progress(axis: Axes, table: pd.DataFrame, style: Style) -> None:
    _curves(axis, table, style, "outside")
    _curves(axis, table, style, "inside", linestyle=":")
    axis.axhline(0, color="0.3", linewidth=1)


def switched(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """X-R8: the largest eigenvalue after the filter is switched on or off (dashed) and without (solid), over seeds."""
    by = ["dataset", "model", "optimizer", "then", "step", "after"]
    groups = tables["switched"].groupby(by, sort=False)
    table = groups[["sharpness", "loss"]].mean().reset_index()
    table = table.assign(deviation=groups["sharpness"].std().to_numpy(), seeds=groups.size().to_numpy())
    steps = sorted(table["step"].unique())
    figure, axes = style.panels(1, max(1, len(steps)), height=3.0, sharey=True)
    colours = style.colours(table["then"])
    for axis, step in zip(axes[0], steps, strict=False):
        for (before, then), own in table[table["step"] == step].groupby(["optimizer", "then"], sort=False):
            line = "-" if before == then else "--"
            label = f"{then} throughout" if before == then else f"{before}, then {then}"
            axis.plot(own["after"], own["sharpness"], color=colours[then], linestyle=line, label=label)
            half = np.nan_to_num(own["deviation"])
            axis.fill_between(
                own["after"],
                own["sharpness"] - half,
                own["sharpness"] + half,
                color=colours[then],
                alpha=0.15,
                linewidth=0,
            )
        axis.set(title=f"switched at step {step}", xlabel="steps after")
    axes[0, 0].set_ylabel("largest Hessian\neigenvalue")
    legend_below(figure, ncols=2, fontsize="small")
    return figure, table
