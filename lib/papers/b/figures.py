"""Figures of paper B along training: pure functions from the tables of :mod:`papers.b.measures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from papers.b.tables import in_order
from papers.common.runs import Tables
from papers.common.style import Style, below, beside, early_steps, legend_below

NULL: dict[str, Any] = {"color": "0.55", "linestyle": ":", "linewidth": 1.0}
"""How the level of chance is drawn."""


def scale(table: pd.DataFrame, title: str = "") -> str:
    """What a panel was measured on: network, data, number of parameters, examples in the measure."""
    row = table.iloc[0]
    lines = [title] if title else []
    lines += [f"{row['model']}, {row['dataset']}", f"P = {row['parameters']:,}, {row['examples']:,} examples"]
    return "\n".join(lines)


def quantity(table: pd.DataFrame, name: str, index: int | None = None) -> pd.DataFrame:
    """The rows of one quantity by step; of one index if it is given."""
    found = table[table["quantity"] == name]
    return (found if index is None else found[found["index"] == index]).sort_values("step")


def _first(table: pd.DataFrame) -> float:
    """The first step after the start that was measured."""
    return float(table.loc[table["step"] > 0, "step"].min())


def classes(table: pd.DataFrame) -> int:
    """k, the number of classes: the dimension that f_top is measured in."""
    return int(quantity(table, "f_top")["index"].iloc[0])


def f_top_with_training(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-F1: f_top early in training, above the loss and the accuracy; one column a network."""
    tables = in_order(tables, order)
    figure, axes = style.panels(2, len(tables), sharex="col")
    drawn = []
    for column, table in zip(axes.T, tables.values(), strict=True):
        drawn.append(_fractions(column[0], table, ("f_top", "f_next")))
        column[0].set_title(scale(table), fontsize="small")
        drawn += [_training(column[1], table)]
        early_steps(column[0], _first(table))
    axes[0, 0].set_ylabel("share of squared gradient")
    axes[1, 0].set_ylabel("loss, accuracy")
    for axis in axes[:, -1]:
        beside(axis, fontsize="x-small")
    return figure, pd.concat(drawn, ignore_index=True)


LABELS = {
    "f_top": "top k eigenvectors",
    "f_next": "next k eigenvectors",
    "f_class": "span of class gradients",
    "class_overlap": "class gradients and top k",
    "hg_overlap": "gradient, Hessian times gradient",
    "vertex_overlap": "vertex of the top subspace (eq. 4)",
    "loss": "loss",
    "accuracy": "accuracy",
}


def _fractions(axis: Axes, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Lines of several shares with the chance level k/P."""
    drawn = [quantity(table, name) for name in names]
    for name, part in zip(names, drawn, strict=True):
        axis.plot(part["step"], part["value"], marker="o", label=LABELS[name])
    axis.axhline(drawn[0]["null"].iloc[0], label="chance, k/P", **NULL)
    axis.set_ylim(-0.03, 1.03)
    return pd.concat(drawn)


def _training(axis: Axes, table: pd.DataFrame) -> pd.DataFrame:
    drawn = [quantity(table, name) for name in ("loss", "accuracy")]
    for part in drawn:
        axis.plot(part["step"], part["value"], marker="o", label=part["quantity"].iloc[0])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    return pd.concat(drawn)


def subspace_overlaps(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-F2: overlap (eq. 5) of the top k subspace at t1 with that at t2, and of the next k; one column a network."""
    tables = in_order(tables, order)
    figure, axes = style.panels(2, len(tables), sharex="col", sharey=True)
    drawn = []
    for column, table in zip(axes.T, tables.values(), strict=True):
        k = classes(table)
        for axis, name in zip(column, ("top_overlap", "next_overlap"), strict=True):
            drawn.append(_overlap_lines(axis, quantity(table, name, k), style))
        column[0].set_title(scale(table), fontsize="small")
        column[1].set_xlabel("step t₂")
        early_steps(column[1], _first(table))
        below(column[1], title="step t₁", fontsize="x-small", ncols=3)
    axes[0, 0].set_ylabel("overlap, top k")
    axes[1, 0].set_ylabel("overlap, next k")
    return figure, pd.concat(drawn, ignore_index=True)


def _overlap_lines(axis: Axes, part: pd.DataFrame, style: Style) -> pd.DataFrame:
    """One line for each starting step, from 1 at that step on, and the chance level."""
    starts = sorted(part["start_step"].unique())
    for start, colour in zip(starts, style.sequence(len(starts)), strict=True):
        line = part[part["start_step"] == start]
        axis.plot([start, *line["step"]], [1.0, *line["value"]], marker="o", color=colour, label=f"{start:.0f}")
    axis.axhline(part["null"].iloc[0], **NULL)
    axis.set_ylim(-0.03, 1.03)
    return part


def overlap_by_dimension(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-F3: the overlap averaged over t2 and seeds, against the dimension of the subspace; k - 1 is marked."""
    tables = in_order(tables, order)
    figure, axes = style.panels(1, len(tables), sharey=True)
    drawn = []
    for axis, table in zip(axes[0], tables.values(), strict=True):
        means = mean_overlaps(table)
        starts = sorted(means["start_step"].unique())
        for start, colour in zip(starts, style.sequence(len(starts)), strict=True):
            line = means[means["start_step"] == start].groupby("dimension", as_index=False)[["value", "null"]].mean()
            axis.plot(line["dimension"], line["value"], marker="o", color=colour, label=f"{start:.0f}")
        axis.plot(line["dimension"], line["null"], **NULL)
        axis.axvline(classes(table) - 1, color="0.3", linestyle="--", linewidth=0.8, zorder=0)
        axis.set(xlabel="dimension of the subspace (dashed: k − 1)", ylim=(-0.03, 1.03))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        seeds = means["seed"].nunique()
        axis.set_title(scale(table, f"mean of {seeds} seeds" if seeds > 1 else ""), fontsize="small")
        below(axis, title="step t₁", fontsize="x-small", ncols=3)
        drawn.append(means)
    axes[0, 0].set_ylabel("mean overlap over t₂")
    return figure, pd.concat(drawn, ignore_index=True)


def mean_overlaps(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of the top-subspace overlap over the later steps that were measured, for each start_step and dimension."""
    found = quantity(table, "top_overlap").rename(columns={"index": "dimension"})
    keys = ["dataset", "model", "seed", "start_step", "dimension"]
    return found.groupby(keys, as_index=False).agg(value=("value", "mean"), null=("null", "first"))


def overlaps_of_dimensions(tables: Tables, style: Style, dimensions: Sequence[int]) -> tuple[Figure, pd.DataFrame]:
    """B-F9, B-F10: overlap of the top subspaces at t1 and t2, one panel for each dimension."""
    (table,) = tables.values()
    figure, axes = style.panels(2, -(-len(dimensions) // 2), sharex=True, sharey=True)
    drawn = []
    for axis, dimension in zip(axes.flat, dimensions, strict=False):
        drawn.append(_overlap_lines(axis, quantity(table, "top_overlap", dimension), style))
        axis.set_title(f"top {dimension}")
    for axis in axes[-1]:
        axis.set_xlabel("step t₂")
    for axis in axes[:, 0]:
        axis.set_ylabel("overlap")
    early_steps(axes[0, 0], _first(table))
    legend_below(figure, ncols=6, title="step t₁")
    figure.suptitle(scale(table), fontsize="small")
    return figure, pd.concat(drawn, ignore_index=True)


def largest_eigenvalue(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """B-F8: the largest eigenvalue of the Hessian through training, one panel a network."""
    figure, axes = style.panels(1, len(tables))
    drawn = []
    for axis, table in zip(axes[0], tables.values(), strict=True):
        part = quantity(table, "eigenvalue", 1)
        axis.plot(part["step"], part["value"], marker="o")
        axis.set(xlabel="step", ylabel="λ₁ of the Hessian", yscale="log")
        early_steps(axis, _first(table))
        axis.set_title(scale(table), fontsize="small")
        drawn.append(part)
    return figure, pd.concat(drawn, ignore_index=True)


def gradient_by_eigenvector(tables: Tables, style: Style, steps: Sequence[int]) -> tuple[Figure, pd.DataFrame]:
    """B-F11: c_i² (eq. 12) for the first 2k eigenvectors after some numbers of steps."""
    (table,) = tables.values()
    k = classes(table)
    figure, axes = style.panels(2, -(-len(steps) // 2), sharex=True, sharey=True)
    drawn = []
    for axis, step in zip(axes.flat, steps, strict=False):
        part = quantity(table, "c2")
        part = part[(part["step"] == step) & (part["index"] <= 2 * k)].sort_values("index")
        axis.bar(part["index"], part["value"], color=["C0" if i <= k else "C1" for i in part["index"]])
        sums = [part.loc[part["index"] <= k, "value"].sum(), part.loc[part["index"] > k, "value"].sum()]
        axis.set_title(f"step {step}: Σ₁…ₖ = {sums[0]:.2f}, Σₖ₊₁…₂ₖ = {sums[1]:.2f}", fontsize="small")
        drawn.append(part)
    for axis in axes[-1]:
        axis.set_xlabel("eigenvector i, largest eigenvalue first")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.set_ylabel("cᵢ²")
    axes[0, 0].set(yscale="log", ylim=(1e-4, 1))
    figure.suptitle(scale(table), fontsize="small")
    return figure, pd.concat(drawn, ignore_index=True)


def f_top_under_changes(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-F12: f_top with one thing changed at a time; the label of each input is the panel's title."""
    tables = in_order(tables, order)
    figure, axes = style.panels(2, -(-len(tables) // 2), sharey=True)
    drawn = []
    for axis, (label, table) in zip(axes.flat, tables.items(), strict=False):
        drawn.append(_fractions(axis, table, ("f_top",)).assign(change=label))
        axis.set_title(scale(table, label), fontsize="small")
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("f_top")
    legend_below(figure)
    return figure, pd.concat(drawn, ignore_index=True)


def nulls(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-X1: every overlap beside what a random subspace or vector gives; the class-gradient span beside the rest."""
    tables = in_order(tables, order)
    figure, axes = style.panels(3, len(tables), sharex="col")
    drawn = []
    rows = (("f_top", "f_next", "f_class"), ("class_overlap",), ("hg_overlap", "vertex_overlap"))
    for column, table in zip(axes.T, tables.values(), strict=True):
        for axis, names in zip(column, rows, strict=True):
            drawn.append(_with_random(axis, table, names))
        column[0].set_title(scale(table), fontsize="small")
        column[0].set_yscale("log")
        column[1].set_yscale("log")
        column[-1].set_xlabel("step")
        early_steps(column[-1], _first(table))
    for axis, label in zip(axes[:, 0], ("share of gradient", "subspace overlap", "overlap(g, Hg)"), strict=True):
        axis.set_ylabel(label)
    for axis in axes[:, -1]:
        beside(axis, fontsize="x-small")
    return figure, pd.concat(drawn, ignore_index=True)


def _with_random(axis: Axes, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    drawn = [quantity(table, name) for name in names]
    for name, part in zip(names, drawn, strict=True):
        axis.plot(part["step"], part["value"], marker="o", label=LABELS[name])
    first = drawn[0]
    axis.plot(first["step"], first["random"], label="random", marker=".", **NULL)
    if first["null"].notna().all():
        axis.plot(first["step"], first["null"], label="expected of random", color="0.3", linewidth=0.8, linestyle="--")
    return pd.concat(drawn)


def dominant_and_bulk(tables: Tables, style: Style, window: int = 25) -> tuple[Figure, pd.DataFrame]:
    """B-X2: training loss and validation accuracy of SGD, of its part in the top k eigenspace, and of the rest.

    The minibatch loss is a running mean over ``window`` steps; runs with several seeds show median and range.
    """
    runs = tables["runs"].sort_values("step")
    smooth = runs[runs["step"] > 0].copy()
    keys = ["optimizer", "seed"]
    smooth["train_loss"] = smooth.groupby(keys)["train_loss"].transform(lambda s: s.rolling(window, 1).mean())
    figure, axes = style.panels(1, 2)
    drawn = []
    for name, colour in style.colours(runs["optimizer"]).items():
        one = runs[runs["optimizer"] == name]
        part = smooth[smooth["optimizer"] == name]
        left = style.band(axes[0, 0], part, "step", "train_loss", label=name, colour=colour)
        right = style.band(axes[0, 1], one, "step", "val_accuracy", label=name, colour=colour, marker="o")
        drawn += [left.assign(optimizer=name, quantity="train_loss")]
        drawn += [right.assign(optimizer=name, quantity="val_accuracy")]
    axes[0, 0].set(xlabel="step", ylabel="minibatch loss", yscale="log")
    axes[0, 1].set(xlabel="step", ylabel="validation accuracy")
    legend_below(figure)
    first = runs.iloc[0]
    title = f"{first['model']}, {first['dataset']}, batch {first['batch_size']}, η = {first['lr']:g}"
    figure.suptitle(title, fontsize=style.font_size)
    return figure, pd.concat(drawn, ignore_index=True)
