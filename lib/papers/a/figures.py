"""Figures of paper A: pure functions from tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.a.tables import crossovers
from papers.common.runs import Tables
from papers.common.style import Style, below, early_steps, legend_below

QUANTITIES = {
    "share of gradient": "|g|²",
    "share of trace G": "Tr G",
    "share of trace H": "Tr H",
}
RUN = ["dataset", "model", "optimizer", "batch_size", "lr"]


def loss_over_training(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """A-F1: validation loss over epochs, one line an optimiser (median over seeds, band their range)."""
    runs = known_or_diverged(tables["runs"], "val_loss")
    limit, lowest = 1.5 * runs.loc[runs["step"] == 0, "val_loss"].median(), runs["val_loss"].min()
    figure, axes = style.panels()
    axis = axes[0, 0]
    drawn = []
    for name, colour in style.colours(runs["optimizer"]).items():
        part = runs[runs["optimizer"] == name]
        fewer = part["seed"].nunique() < runs["seed"].nunique()
        label = f"{name} ({_seeds(part)})" if fewer else name
        band = style.band(axis, part, "epoch", "val_loss", label=label, colour=colour, limit=limit, marker="o")
        drawn.append(band.assign(optimizer=name))
    axis.set(xlabel="epoch", ylabel="validation loss", title=describe(runs), ylim=(0.9 * lowest, limit))
    legend_below(figure, ncols=2)
    return figure, pd.concat(drawn, ignore_index=True)


def _seeds(runs: pd.DataFrame) -> str:
    seeds = runs["seed"].nunique()
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def known_or_diverged(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows in which a loss was evaluated; a run's last row counts as infinite if its loss is no number there.

    A run that ended before another seed's stands, infinite, at the next step at which that one was evaluated: a median
    over seeds at a step of its own would be of this run alone.
    """
    last = runs["step"] == runs.groupby([*RUN, "seed"], dropna=False)["step"].transform("max")
    seen = runs[runs[column].notna() | last].fillna({column: math.inf})
    early = last[seen.index] & (seen["step"] < seen.groupby(RUN, dropna=False)["step"].transform("max"))
    if not early.any():
        return seen
    grid = seen.loc[~early, [*RUN, "step", "epoch"]].drop_duplicates().sort_values("step")
    ended = seen[early].drop(columns="epoch").sort_values("step").rename(columns={"step": "own"})
    moved = pd.merge_asof(ended, grid, left_on="own", right_on="step", by=RUN, direction="forward")
    return pd.concat([seen[~early], moved.assign(**{column: math.inf})], ignore_index=True)


def describe(runs: pd.DataFrame) -> str:
    """Scale of a set of runs in a title: data, network, batch, learning rate, seeds."""
    parts = [f"{runs['dataset'].iloc[0]}, {runs['model'].iloc[0]}"]
    if runs["batch_size"].nunique() == 1:
        parts.append(f"batch {runs['batch_size'].iloc[0]}")
    if runs["lr"].nunique() == 1:
        parts.append(f"η = {runs['lr'].iloc[0]:g}")
    parts.append(_seeds(runs))
    return ", ".join(parts)


def loss_by_batch_size(tables: Tables, style: Style, pairs: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """A-F2: training loss against step by batch size; crossovers between the optimisers are marked.

    ``pairs``: method -> SGD with the same momentum. A dotted line stands where SGD falls below its method for good.
    """
    runs = known_or_diverged(tables["runs"], "eval_train_loss")
    limit = 1.5 * runs.loc[runs["step"] == 0, "eval_train_loss"].median()
    sizes = sorted(runs["batch_size"].unique())
    colours = style.colours(name for method, sgd in pairs.items() for name in (sgd, method))
    figure, axes = style.panels(2, -(-len(sizes) // 2), sharey=True)
    drawn = []
    for axis, size in zip(axes.flat, sizes, strict=False):
        part = runs[runs["batch_size"] == size]
        for name, colour in colours.items():
            one = part[part["optimizer"] == name]
            band = style.band(axis, one, "step", "eval_train_loss", label=name, colour=colour, limit=limit)
            drawn.append(band.assign(batch_size=size, optimizer=name))
        notes = [_mark_crossover(axis, part, sgd, method, colours[method]) for method, sgd in pairs.items()]
        full = part.loc[part["step"] > 0, "epoch"].min() == part.loc[part["step"] > 0, "step"].min()
        note = "; ".join(filter(None, notes)) or "no crossover"
        seeds = part["seed"].nunique()
        marks = [*(["full"] if full else []), *([f"{seeds} seeds"] if seeds < runs["seed"].nunique() else [])]
        axis.set_title(f"batch {size}{' (' + ', '.join(marks) + ')' if marks else ''}: {note}")
        axis.set(xlabel="step", ylabel="training loss")
        axis.set_xlim(left=0)
    axes[0, 0].set_ylim(0, limit)
    for axis in list(axes.flat)[len(sizes) :]:
        axis.set_visible(False)
    legend_below(figure, ncols=2)
    figure.suptitle(describe(runs), fontsize=style.font_size)
    return figure, pd.concat(drawn, ignore_index=True)


def _mark_crossover(axis: Axes, part: pd.DataFrame, overtaking: str, overtaken: str, colour: object) -> str:
    found = crossovers(part, overtaking, overtaken).iloc[0]
    if not np.isfinite(found["crossover_step"]):
        return ""
    axis.axvline(found["crossover_step"], color=colour, linestyle=":")
    epoch = found["crossover_epoch"]
    return f"crossover at epoch {epoch:.0f}" if epoch >= 10 else f"crossover at epoch {epoch:.2g}"


def top_eigenvalues(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """A-F3: the largest eigenvalues of the Hessian after training; the number of classes is marked."""
    values = tables["measure"]
    figure, axes = style.panels()
    axis = axes[0, 0]
    axis.plot(values["index"], values["eigenvalue"], "o-", markersize=4)
    classes = int(values["classes"].iloc[0])
    axis.axvline(classes + 0.5, color="0.4", linestyle=":", label=f"number of classes, {classes}")
    gaps = -values["eigenvalue"].diff().to_numpy()[1:]
    largest = int(values["index"].iloc[int(np.argmax(gaps))])
    axis.set(xlabel="index of the eigenvalue", ylabel="eigenvalue of the Hessian", yscale="log")
    axis.set_title(f"{title_of(values)}\nlargest gap after eigenvalue {largest}")
    below(axis)
    return figure, values


def title_of(measure: pd.DataFrame) -> str:
    """Scale of a measure in a title: data, network, step, examples."""
    first = measure.iloc[0]
    text = f"{first['dataset']}, {first['model']}"
    if measure["step"].nunique() == 1:
        text += f", step {first['step']}"
    return f"{text}, {first['examples']} examples"


def rank_of_union(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """A-F4a: rank of class gradients and final eigenvectors together through training, by tolerance."""
    measure = tables["measure"]
    ranks = measure[measure["quantity"] == "rank"]
    profile = measure[measure["quantity"] == "singular value"]
    figure, axes = style.panels(1, 2)
    tolerances = sorted(ranks["tolerance"].unique())
    for tolerance, colour in zip(tolerances, style.sequence(len(tolerances)), strict=True):
        part = ranks[ranks["tolerance"] == tolerance]
        axes[0, 0].plot(part["step"], part["value"], "o-", color=colour, label=f"tolerance {tolerance:g}")
    classes = int(measure["classes"].iloc[0])
    for height, name in ((classes, "C"), (2 * classes + 1, "2C + 1: full")):
        axes[0, 0].axhline(height, color="0.4", linestyle=":")
        axes[0, 0].annotate(name, (0.01, height), xycoords=("axes fraction", "data"), va="bottom")
    axes[0, 0].set(xlabel="step", ylabel="rank of [v, e]", title=title_of(measure))
    axes[0, 0].set_ylim(0, 2.6 * classes)
    early_steps(axes[0, 0])
    below(axes[0, 0], ncols=3, fontsize="x-small")
    steps = sorted(profile["step"].unique())
    for step, colour in zip(steps, style.sequence(len(steps)), strict=True):
        part = profile[profile["step"] == step]
        label = f"step {step}" if step in (steps[0], steps[len(steps) // 2], steps[-1]) else None
        axes[0, 1].plot(part["index"], part["value"] / part["value"].max(), color=colour, label=label)
    axes[0, 1].set(xlabel="index", ylabel="singular value / largest", yscale="log", title="singular values of [v, e]")
    below(axes[0, 1], ncols=3, fontsize="x-small")
    return figure, measure


def cosine_matrix(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """A-F4b: |cos| of each class gradient with each top eigenvector; the best assignment is outlined."""
    measure = tables["measure"]
    matrix = measure.pivot_table(index="class", columns="index", values="cosine")
    figure, axes = style.panels()
    axis = axes[0, 0]
    axis.grid(visible=False)
    image = axis.imshow(matrix.to_numpy(), vmin=0, vmax=1, cmap="viridis")
    for _, row in measure[measure["assigned"]].iterrows():
        i, j = matrix.index.get_loc(row["class"]), matrix.columns.get_loc(row["index"])
        axis.plot(j, i, "s", markersize=11, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.5)
    axis.set_xticks(range(matrix.shape[1]), matrix.columns)
    axis.set_yticks(range(matrix.shape[0]), matrix.index)
    axis.set(xlabel="eigenvector of the Hessian", ylabel="class")
    first = measure.iloc[0]
    axis.set_title(
        f"{title_of(measure)}\nmean |cos| of the assignment {first['mean_cosine']:.2f}"
        f" (random vectors {first['null']:.1e})"
    )
    figure.colorbar(image, ax=axis, label="|cos|")
    return figure, measure


def diagnosis(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """A-X1: by network, along training: λ_k against the curvature, cosines of the v_k, shares, principal angles."""
    measure = tables["measure"]
    keys = measure[["dataset", "model", "optimizer"]].drop_duplicates().itertuples(index=False)
    networks = [tuple(key) for key in keys]
    figure, axes = style.panels(len(networks), 4, height=2.7, sharey="col")
    for row, (dataset, model, optimizer) in zip(axes, networks, strict=True):
        part = measure[(measure["dataset"] == dataset) & (measure["model"] == model)]
        part = part[part["optimizer"] == optimizer]
        _ratio_panel(row[0], part, style)
        row[0].set_title(f"{dataset}, {model}")
        _cosine_panel(row[1], part)
        _share_panel(row[2], part, style)
        _angle_panel(row[3], part, style)
        for axis in row:
            early_steps(axis)
            axis.set_xlabel("step")
    for axis in axes[-1]:
        below(axis, fontsize="x-small")
    return figure, measure


def _ratio_panel(axis: Axes, part: pd.DataFrame, style: Style) -> None:
    ratios = part[part["quantity"] == "ratio"]
    axis.plot(ratios["step"], ratios["value"], ".", color="0.6", markersize=3, label="each class")
    style.band(axis, ratios, "step", "value", label="median, quartiles", low=0.25, high=0.75)
    axis.axhline(1, color="0.3", linestyle=":")
    axis.set(ylabel=r"$\lambda_k\,/\,v_k^\top G v_k$", yscale="log")


def _cosine_panel(axis: Axes, part: pd.DataFrame) -> None:
    cosines = part[part["quantity"] == "cosine"]
    axis.plot(cosines["step"], cosines["value"], ".", color="0.6", markersize=3, label="each pair")
    axis.plot(cosines.groupby("step")["value"].median(), label="median over pairs")
    axis.axhline(0, color="0.3", linestyle=":")
    axis.set(ylabel=r"$v_j^\top v_k$", ylim=(-1, 1))


def _share_panel(axis: Axes, part: pd.DataFrame, style: Style) -> None:
    for quantity, name in QUANTITIES.items():
        one = part[part["quantity"] == quantity]
        style.band(axis, one, "step", "value", label=name, marker="o")
        null = one.groupby("step")["null"].first()
        axis.plot(null, ":", color="0.4", label="random span" if name == "|g|²" else None)
    lowest = part.loc[
        part["quantity"].isin(QUANTITIES), "value"
    ].min()  # shares of an indefinite matrix's trace go below 0
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set(ylabel="share in the span", ylim=(min(0.0, 1.1 * lowest), 1.02))


def _angle_panel(axis: Axes, part: pd.DataFrame, style: Style) -> None:
    for quantity in ("angle to H", "angle to G"):
        one = part[part["quantity"] == quantity]
        label = f"to top-C space of {quantity[-1]}"
        style.band(axis, one, "step", "value", label=label, low=0.0, high=1.0)
    axis.set(ylabel="principal angles (degrees)", ylim=(0, 92))
