"""B-TOY: paper B's toy model beside its exact solution, panel by panel."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.common.runs import Tables
from papers.common.style import Style, below


def toy_model(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """Six panels: eigenvalues, their error, f_top, bulk against sigma, bias, dominance of the k top eigenvalues."""
    table = tables["toy"].assign(later=lambda t: t["time"] > 0)
    later = table[table["later"]].drop(columns="later")
    figure, axes = style.panels(2, 3)
    draw = (_eigenvalues, _errors, _gradient_in_top, _bulk_by_sigma, _bias, _dominance)
    drawn = []
    for axis, panel in zip(axes.flat, draw, strict=True):
        part = panel(axis, later, style)
        if part.empty:
            axis.clear()
            axis.text(0.5, 0.5, "no such case in the config", transform=axis.transAxes, ha="center", va="center")
        drawn.append(part.assign(panel=panel.__name__.removeprefix("_")))
    style.letter(axes.flat)
    return figure, pd.concat(drawn, ignore_index=True)


def _exact(table: pd.DataFrame) -> pd.DataFrame:
    """Eigenvalues that the closed form predicts to be non-zero."""
    return table[(table["quantity"] == "eigenvalue") & (table["expected"] > 0)]


def _eigenvalues(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    found = _exact(table)
    first = found[(found["case"] == found["case"].min()) & (found["index"] <= found["classes"])]
    k = ", ".join(f"k = {classes}" for classes in first["classes"].unique())
    axis.plot(first["time"], first["value"], "o", fillstyle="none", label=f"measured, {k}")
    one = first[first["index"] == 1]
    axis.plot(one["time"], one["expected"], label="exact solution")
    late = one[one["time"] >= 3]
    axis.plot(late["time"], 1 / late["time"], "k:", label="1/(ηt)")
    axis.set(xscale="log", yscale="log", xlabel="time ηt", ylabel="top eigenvalues")
    below(axis, fontsize="x-small", ncols=2)
    return first


def _errors(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    found = _exact(table)
    top = found[(found["index"] <= found["classes"]) & (found["start"] == 0)]
    colours = style.colours(top["case"])
    for (case, k), _ in top.groupby(["case", "classes"]):
        colour = colours[case]
        part = top[(top["case"] == case) & (top["index"] == 1)]
        axis.plot(part["time"], (part["value"] / part["expected"] - 1).abs(), color=colour, label=f"k = {k}, exact")
        axis.plot(part["time"], (part["value"] * part["time"] - 1).abs(), ":", color=colour, label=f"k = {k}, 1/(ηt)")
    axis.axhline(0.01, color="0.6", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="log", xlabel="time ηt", ylabel="relative error of λ₁")
    below(axis, fontsize="x-small", ncols=2)
    return top


def _gradient_in_top(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    part = table[(table["quantity"] == "f_top") & ~table["bias"] & ~table["orthonormal"]]
    for _, one in part.groupby("case"):
        row = one.iloc[0]
        axis.plot(one["time"], one["value"], marker="o", label=f"k = {row['classes']}, σ = {row['sigma']:g}")
    axis.set(xscale="log", xlabel="time ηt", ylabel="f_top", ylim=(-0.03, 1.03))
    below(axis, fontsize="x-small", ncols=2)
    return part


def _bulk_by_sigma(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    part = table[(table["quantity"] == "bulk_edge") & (table["sigma"] > 0) & table["orthonormal"]]
    times = sorted(part["time"].unique())[::2]
    for time, colour in zip(times, style.sequence(len(times)), strict=True):
        line = part[part["time"] == time].sort_values("sigma")
        axis.plot(line["sigma"], line["value"], marker="o", color=colour, label=f"{time:g}")
    slope = part[part["time"].isin(times[-1:])].sort_values("sigma")
    if len(slope) > 1:
        first = slope.iloc[0]
        axis.plot(slope["sigma"], first["value"] * (slope["sigma"] / first["sigma"]) ** 2, "k:", label="∝ σ²")
    axis.set(xscale="log", yscale="log", xlabel="σ", ylabel="largest bulk eigenvalue")
    sigmas = sorted(part["sigma"].unique())
    axis.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
    axis.set_xticks([], minor=True)
    below(axis, title="ηt", fontsize="x-small", ncols=3)
    return part


def _bias(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    biased = table[table["bias"]]
    part = biased[biased["quantity"] == "f_smallest"]
    colours = style.colours(part["case"])
    for case, one in part.groupby("case"):
        k = one["classes"].iloc[0]
        axis.plot(one["time"], one["value"], marker="o", color=colours[case], label=f"k = {k}: along λₖ")
        values = biased[(biased["case"] == case) & (biased["quantity"] == "eigenvalue")]
        values = values.pivot_table(index="time", columns="index", values="value")
        axis.plot(values.index, values[k] / values[k - 1], ":", color=colours[case], label=f"k = {k}: λₖ/λₖ₋₁")
    axis.set(xscale="log", xlabel="time ηt", ylabel="with biases: share of gradient", ylim=(-0.03, 1.03))
    below(axis, fontsize="x-small")
    return part


def _dominance(axis: Axes, table: pd.DataFrame, style: Style) -> pd.DataFrame:
    part = table[(table["quantity"] == "dominance") & (table["sigma"] == 0) & ~table["bias"] & (table["classes"] > 2)]
    for k, one in part[part["start"] == 0].groupby("classes"):
        (line,) = axis.plot(one["time"], one["value"], marker="o", label=f"k = {k}")
        limit = k / (k + (k - 2))  # k eigenvalues pq and k(k - 2) eigenvalues q/k, p -> 1
        axis.axhline(limit, color=line.get_color(), linestyle=":", linewidth=1.0)
    axis.set(xscale="log", xlabel="time ηt", ylabel="share of trace in top k", ylim=(0, 1))
    below(axis, title="dotted: limit", fontsize="x-small", ncols=2)
    return part.assign(limit=np.where(part["classes"] > 0, part["classes"] / (2 * part["classes"] - 2), np.nan))
