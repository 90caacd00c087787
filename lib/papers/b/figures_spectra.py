"""Paper B's spectra and eigenvectors: figures 4 to 7."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.b.tables import in_order, outlier_count
from papers.common.runs import Tables
from papers.common.style import Style, below, legend_below


def spectra(tables: Tables, style: Style, order: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """B-F4: the Hessian's spectrum at the end of training; eigenvalues that stand out are numbered."""
    tables = in_order(tables, order)
    figure, axes = style.panels(1, len(tables))
    drawn = []
    for axis, (label, table) in zip(axes[0], tables.items(), strict=True):
        values = table[table["quantity"] == "eigenvalue"].sort_values("index")
        density = table[table["quantity"] == "density"]
        count = outlier_count(values["eigenvalue"])
        axis.set(xlabel="eigenvalue", yscale="log")
        _bulk(axis, values["eigenvalue"].to_numpy(), density, table["parameters"].iloc[0])
        _numbered(axis, values["eigenvalue"].to_numpy()[:count])
        row = table.iloc[0]
        axis.set_title(
            f"{label}: {count} stand out\n{row['model']}, {row['dataset']}, {row['examples']:,} examples\n"
            f"P = {row['parameters']:,}, accuracy {row['accuracy']:.2f}",
            fontsize="small",
        )
        drawn.append(pd.concat([values, density]).assign(labels=label, outliers=count))
    axes[0, 0].set_ylabel("eigenvalues per unit")
    return figure, pd.concat(drawn, ignore_index=True)


def _bulk(axis: Axes, values: np.ndarray, density: pd.DataFrame, parameters: int) -> None:
    """All eigenvalues as a histogram, or their density as a line (both in eigenvalues per unit)."""
    if len(density):
        axis.plot(density["eigenvalue"], density["value"].clip(lower=1e-12) * parameters, linewidth=1.0)
        axis.set_ylim(bottom=1e-2)
        return
    counts, edges = np.histogram(values, bins=120)
    axis.stairs(counts / np.diff(edges), edges, fill=True)


def _numbered(axis: Axes, values: np.ndarray) -> None:
    """Ticks at the eigenvalues that stand out, numbered from the largest where there is room."""
    low, (left, right) = axis.get_ylim()[0], axis.get_xlim()
    axis.plot(values, np.full(len(values), 2 * low), "|", color="C3", markersize=10)
    free = np.inf
    for i, value in enumerate(values, start=1):
        if free - value > 0.05 * (right - left):
            axis.annotate(str(i), (value, 4 * low), ha="center", fontsize="x-small", color="C3")
            free = value


def right_edge(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """B-F5: density of the logarithm of the top eigenvalues, averaged over initialisations; the k-th is marked."""
    table = tables["edge"]
    positive = table[table["eigenvalue"] > 0]
    seeds = table["seed"].nunique()
    logs = np.log10(positive["eigenvalue"])
    density, edges = np.histogram(logs, bins=min(60, round(len(logs) ** 0.5) + 1), density=True)
    figure, axes = style.panels()
    axis = axes[0, 0]
    axis.stairs(density, edges, fill=True, alpha=0.7)
    k = int(table["classes"].iloc[0])
    places = np.log10(positive.loc[positive["index"] == k, "eigenvalue"])
    mean = places.mean()
    axis.axvline(mean, color="C3", linestyle="--", linewidth=1.0, label=f"mean place of eigenvalue {k}")
    each = {"linestyle": "none", "marker": "|", "color": "C3", "markersize": 12, "label": "in each initialisation"}
    axis.plot(places, np.zeros(len(places)), clip_on=False, **each)
    row = table.iloc[0]
    axis.set(xlabel="log₁₀ of the eigenvalue", ylabel="density")
    axis.set_title(
        f"{row['model']}, {row['dataset']}, k = {k}, P = {row['parameters']:,}\n"
        f"top {table['index'].max()} eigenvalues, {row['examples']:,} examples, {seeds} initialisations",
        fontsize="small",
    )
    below(axis, ncols=2)
    drawn = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "density": density})
    return figure, drawn.assign(dataset=row["dataset"], model=row["model"], seeds=seeds, classes=k, mark=mean)


def eigenvector_entries(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """B-F6: entries of the top eigenvector by their place in the network, one panel a step."""
    table = tables["entries"]
    steps = sorted(table["step"].unique())
    figure, axes = style.panels(2, -(-len(steps) // 2), sharex=True)
    colours = style.colours(table["tensor"])
    for axis, step in zip(axes.flat, steps, strict=False):
        part = table[table["step"] == step]
        for tensor, entries in part.groupby("tensor", sort=False):
            row = entries.iloc[0]
            look = {"color": colours[tensor], "label": f"layer {row['layer']} {row['part']}", "rasterized": True}
            axis.scatter(_place(entries), entries["value"], s=2, **look)
            place = {"x": row["tensor_rank"] + 0.5, "y": 0.99, "transform": axis.get_xaxis_transform()}
            axis.text(**place, s=f"{row['tensor_norm']:.2f}", ha="center", va="top", fontsize="x-small")
        axis.margins(y=0.12)
        axis.set_title(f"step {step}: λ₁ = {part['eigenvalue'].iloc[0]:.3g}", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("place in the parameter vector\n(tensors equally wide; above: norms)")
        axis.set_xticks([])
    for axis in axes[:, 0]:
        axis.set_ylabel("entry of v₁")
    legend_below(figure, markerscale=3)
    figure.suptitle(_subject(table), fontsize="small")
    return figure, table


def _place(entries: pd.DataFrame) -> pd.Series:
    """Place of entries with every tensor one unit wide: a bias would vanish beside a weight matrix."""
    offset = entries["entry"] - entries["entry"].min()
    return entries["tensor_rank"] + offset / entries["tensor_size"]


def last_layer_entries(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """B-F7: the top eigenvector's entries in the last layer, at the first and the last of the steps."""
    table = tables["entries"]
    last = table[table["layer"] == table["layer"].max()]
    steps = sorted(last["step"].unique())
    shown = [steps[0], steps[-1]]
    figure, axes = style.panels(2, 2, sharey="col")
    for row, step in zip(axes, shown, strict=True):
        part = last[last["step"] == step]
        for axis, (name, entries) in zip(row, part.groupby("part", sort=False), strict=True):
            axis.vlines(entries["entry"] - entries["entry"].min(), 0, entries["value"], linewidth=0.6, color="C2")
            axis.set_title(f"step {step}, last layer's {name}", fontsize="small")
        row[0].set_ylabel("entry of v₁")
    for axis in axes[-1]:
        axis.set_xlabel("entry")
    figure.suptitle(_subject(table), fontsize="small")
    return figure, last[last["step"].isin(shown)]


def _subject(table: pd.DataFrame) -> str:
    row = table.iloc[0]
    total = f"P = {row['parameters']:,}, {row['examples']:,} examples"
    listed = len(table) / table["step"].nunique()
    shown = "" if listed == row["parameters"] else f" ({listed:,.0f} entries shown)"
    return f"top eigenvector of {row['model']}, {row['dataset']}; {total}{shown}"
