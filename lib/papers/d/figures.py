"""Figures of paper D, from tidy tables. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from papers.common.intervals import interval
from papers.common.runs import Tables
from papers.common.style import Style, below, legend_below, line_through, rate
from papers.d.tables import (
    RUN,
    at_budget,
    best_settings,
    by_sign,
    evaluated,
    rank_correlation,
)

Drawn = tuple[Figure, pd.DataFrame]
KINDS = {
    "LA": "largest eigenvalues",
    "SA": "most negative eigenvalues",
    "class gradient": "class gradients",
    "random": "random directions",
}
NEGATIVE = "C3"
"""Colour of whatever belongs to the most negative curvature, in all of these figures."""


def spectrum(tables: Tables, style: Style) -> Drawn:
    """D-F1: |λ| of the largest eigenvalues and of the most negative one, and the loss, against step."""
    table = tables["spectrum"]
    groups = list(table.groupby(["dataset", "model"], sort=False))
    figure, axes = style.panels(1, len(groups), sharey=False)
    for axis, ((dataset, model), part) in zip(axes[0], groups, strict=True):
        top = part[part["end"] == "LA"]
        indices = sorted(top["index"].unique())
        for colour, index in zip(style.sequence(len(indices)), indices, strict=True):
            line = top[top["index"] == index]
            axis.plot(line["step"], line["eigenvalue"].abs(), color=colour, label=rf"$\lambda_{{{index}}}$")
        bottom = part[(part["end"] == "SA") & (part["index"] == 1)]
        axis.plot(bottom["step"], bottom["eigenvalue"].abs(), color=NEGATIVE, label=r"$|\lambda_d|$, the most negative")
        loss = part.drop_duplicates("step")
        axis.plot(loss["step"], loss["subset_loss"], color="black", linestyle=":", label="training loss")
        axis.set(yscale="log", xlabel="step")
        axis.set_title(f"{dataset}, {model}, {part['examples'].iloc[0]} examples")
    axes[0, 0].set_ylabel("|eigenvalue|, loss")
    legend_below(figure, ncols=4)
    return figure, table


def fixed_directions(tables: Tables, style: Style) -> Drawn:
    """D-F2: the curvature along a direction found at t0, at all other steps, with λ_1(t) and λ_d(t) beside it."""
    table, ends = tables["directions"], tables["spectrum"]
    groups = list(table.groupby(["end", "origin_step"], sort=False))
    figure, axes = style.panels(-(-len(groups) // 2), 2, sharex=True)
    extremes = ends[ends["index"] == 1]
    for axis, ((end, origin), line) in zip(axes.flat, groups, strict=False):
        name = "v_1" if end == "LA" else "v_d"
        axis.axhline(0.0, color="0.5", linewidth=0.8)
        axis.axvline(origin, color="C1", linestyle="--", linewidth=1.0)
        for which, colour, label in (("LA", "C2", r"$\lambda_1(t)$"), ("SA", NEGATIVE, r"$\lambda_d(t)$")):
            if end == "SA" and which == "LA":
                continue  # λ_1 is so much larger that nothing else would be seen
            own = extremes[extremes["end"] == which]
            axis.plot(own["step"], own["eigenvalue"], color=colour, linewidth=1.0, label=label)
        label = rf"${name}(t_0)^\top H(t)\, {name}(t_0)$"
        axis.plot(line["step"], line["curvature"], color="C0", marker="o", label=label)
        axis.set_title(f"{'top' if end == 'LA' else 'bottom'} direction of step {origin}")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("curvature")
    legend_below(figure, ncols=2)
    return figure, table


def profiles(tables: Tables, style: Style) -> Drawn:
    """D-F3: the loss along v_1 and v_d and its quadratic model, in both readings of α, at a small and a large range."""
    table = tables["profiles"]
    columns = list(table[["reading", "radius"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = style.panels(2, len(columns))
    for row, end in zip(axes, ("LA", "SA"), strict=True):
        for axis, (reading, radius) in zip(row, columns, strict=True):
            part = table[(table["end"] == end) & (table["reading"] == reading) & (table["radius"] == radius)]
            axis.plot(part["alpha"], part["loss"], color="C1", label="loss")
            axis.plot(part["alpha"], part["quadratic"], color="C0", linestyle="--", label="quadratic model")
            direction = "(gᵀv) v" if reading == "eq. 1" else "v"
            axis.set_xlabel(f"α, in units of {direction}")
            value = part["eigenvalue"].iloc[0]
            names = r"$v_1$, $\lambda_1$" if end == "LA" else r"$v_d$, $\lambda_d$"
            axis.set_title(f"{names} = {value:.3g}", fontsize="small")
        row[0].set_ylabel(f"loss, step {table['step'].iloc[0]}")
    legend_below(figure)
    return figure, table


def large_scale_curvature(tables: Tables, style: Style, radii: Sequence[float]) -> Drawn:
    """D-F4: curvature of quadratic fits over a range of α against the eigenvalue, coloured by step."""
    table = by_sign(tables["directions"])
    figure, axes = style.panels(2, len(radii))
    for row, (column, direction) in zip(axes, (("scaled", "(gᵀv) v"), ("unit", "v")), strict=True):
        for axis, radius in zip(row, radii, strict=True):
            name = f"fit_{column}_{radius:g}"
            scatter(axis, style, table, "curvature", name)
            same_scale(axis, table["curvature"], table[name])
            seen = table.dropna(subset=[name])
            above = (seen[name] > seen["curvature"]).groupby(seen["sign"]).mean()
            words = ", ".join(f"{sign} {share:.0%}" for sign, share in above.items())
            axis.set_title(f"|α| ≤ {radius:g} along {direction}\nabove y = x: {words}", fontsize="small")
        row[0].set_ylabel("curvature of the fit")
    for axis in axes[-1]:
        axis.set_xlabel("eigenvalue")
    legend_below(figure, ncols=6, title="step")
    return figure, table


def inverse_step(tables: Tables, style: Style, narrow: float = 1.0) -> Drawn:
    """D-F5: 1/α* of the line search against the eigenvalue; the lines are y = x and y = |x|."""
    table = by_sign(tables["directions"])
    narrow = close_to_zero(table["curvature"], narrow)
    figure, axes = style.panels(1, 2)
    for axis in axes[0]:
        scatter(axis, style, table, "curvature", "inverse_alpha", hollow="at_edge")
        axis.axhline(0.0, color="0.5", linewidth=0.8)
        axis.set_xlabel("eigenvalue λ")
    same_scale(axes[0, 1], table["curvature"], table["inverse_alpha"])
    axes[0, 0].plot([-narrow, narrow], [-narrow, narrow], color="0.6", linewidth=0.8, zorder=0)
    axes[0, 0].plot([-narrow, 0], [narrow, 0], color="0.6", linestyle=":", linewidth=0.8, zorder=0)
    axes[0, 0].set(xlim=(-narrow, narrow), ylim=(-1.5 * narrow, 1.5 * narrow), ylabel="1/α*")
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(5))
    words = [
        f"{sign} λ: rank correlation {rank_correlation(part['inverse_alpha'], part['curvature']):.2f} (n = {len(part)})"
        for sign, part in table.dropna(subset="inverse_alpha").groupby("sign")
    ]
    axes[0, 1].set_title("\n".join(words), fontsize="small")
    axes[0, 0].set_title(f"|λ| ≤ {narrow:.2g}\nhollow: best at an end of the range", fontsize="small")
    legend_below(figure, ncols=6, title="step")
    return figure, table


def improvement(tables: Tables, style: Style, narrow: float = 0.5) -> Drawn:
    """D-F6: best improvement along each eigenvector against its eigenvalue, and the totals on each sign by step."""
    table = by_sign(tables["directions"])
    narrow = close_to_zero(table["curvature"], narrow)
    figure, axes = style.panels(1, 3)
    for axis in axes[0, :2]:
        scatter(axis, style, table, "curvature", "improvement")
        symmetric_log(axis, table["improvement"], "y")
        axis.axvline(0.0, color="0.5", linewidth=0.8)
        axis.set_xlabel("eigenvalue λ")
    symmetric_log(axes[0, 1], table["curvature"], "x")
    axes[0, 0].set(xlim=(-narrow, narrow), ylabel="decrease of the loss", title=f"|λ| ≤ {narrow:.2g}")
    axes[0, 1].set_title("all")
    below(axes[0, 0], title="step", fontsize="x-small", ncols=4)
    totals = table.groupby(["step", "sign"])["improvement"].agg(["sum", "max", "size"]).reset_index()
    look = {"linestyle": line_through(totals["step"].nunique())}
    for sign, colour in (("positive", "C0"), ("negative", NEGATIVE)):
        part = totals[totals["sign"] == sign]
        count = "–".join(str(n) for n in sorted({part["size"].min(), part["size"].max()})) if len(part) else "0"
        axes[0, 2].plot(part["step"], part["sum"], "o", color=colour, label=f"{sign}: sum over {count}", **look)
        label = f"{sign}: largest one"
        axes[0, 2].plot(part["step"], part["max"], "s", fillstyle="none", color=colour, label=label, **look)
    axes[0, 2].set(xlabel="step", title="by sign", yscale="symlog" if totals["sum"].min() <= 0 else "log")
    below(axes[0, 2], fontsize="x-small")
    return figure, table


def kinds_of_direction(tables: Tables, style: Style, radius: float) -> Drawn:
    """D-X2: the same scans along eigenvectors, class gradients and random directions."""
    table = tables["directions"]
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    colours = dict(zip(kinds, ("C0", NEGATIVE, "C2", "0.4"), strict=False))
    figure, axes = style.panels(1, 2)
    fit = f"fit_unit_{radius:g}"
    for kind in kinds:
        part = table[table["kind"] == kind]
        name = KINDS[kind]
        axes[0, 0].plot(part["curvature"], part[fit], "o", color=colours[kind], label=name, alpha=0.8)
        mean = part.groupby("step")["improvement"].mean()
        label = f"{name} (mean of {part['index'].max()})"
        axes[0, 1].plot(mean.index, mean, "o", linestyle=line_through(len(mean)), color=colours[kind], label=label)
    same_scale(axes[0, 0], table["curvature"], table[fit])
    axes[0, 0].set(xlabel="curvature vᵀHv", ylabel="curvature of the fit", title=f"fit over |t| ≤ {radius:g}")
    axes[0, 1].set(xlabel="step", ylabel="decrease of the loss", title="largest decrease")
    symmetric_log(axes[0, 1], table.groupby(["kind", "step"])["improvement"].mean(), "y")
    for axis in axes[0]:
        below(axis, fontsize="x-small")
    return figure, table


def optimizer(tables: Tables, style: Style, base: str) -> Drawn:
    """D-X1: loss at equal cost, each optimiser at its best learning rate; and how good the running pair is."""
    metrics, estimate = tables["runs"], tables["estimate"]
    figure, axes = style.panels(1, 3)
    at = at_budget(metrics)
    best = best_settings(at)
    drawn = [_race(axes[0, 0], style, metrics, best, base)]
    medians = estimate.groupby("step").median(numeric_only=True)
    joined = line_through(len(medians))
    for column, label, colour, line, marker in (
        ("eigenvalue", "λ_d, true", NEGATIVE, "-", "o"),
        ("curvature", "ṽᵀHṽ on the same examples", "C0", "-", "s"),
        ("estimate", "λ̃, from minibatches", "C0", "--", "^"),
        ("minibatch_eigenvalue", "λ_d of one minibatch", "0.5", ":", "D"),
    ):
        line = line if joined == "-" else "none"
        axes[0, 1].plot(medians.index, medians[column], color=colour, linestyle=line, marker=marker, label=label)
    symmetric_log(axes[0, 1], medians["eigenvalue"], "y")
    axes[0, 1].set(xlabel="step", title="running estimate, median over runs")
    axes[0, 1].set_ylabel("curvature")
    count = int(estimate["bottom"].iloc[0])
    axes[0, 2].plot(
        medians.index,
        medians["cosine"] ** 2,
        "o",
        linestyle=line_through(len(medians)),
        color=NEGATIVE,
        label="(ṽᵀv_d)²",
    )
    axes[0, 2].plot(
        medians.index,
        medians["share"],
        "s",
        linestyle=line_through(len(medians)),
        color="C1",
        label=f"share of ṽ in SA({count})",
    )
    axes[0, 2].axhline(medians["null_share"].iloc[0], color="0.5", linestyle=":", label=f"random, SA({count})")
    axes[0, 2].set(xlabel="step", yscale="log", title="the estimated direction")
    for axis in axes[0]:
        below(axis, fontsize="x-small")
    return figure, pd.concat([*drawn, estimate.assign(what="running estimate")], ignore_index=True)


def _race(axis: Axes, style: Style, metrics: pd.DataFrame, best: pd.DataFrame, base: str) -> pd.DataFrame:
    """Training loss against cost for the best setting of each optimiser, and its ratio to the base at the budget."""
    rows = evaluated(metrics).merge(best[RUN], on=RUN)
    reference = best[best["optimizer"] == base].set_index("seed")["eval_train_loss"]
    parts = []
    for name, part in rows.groupby("optimizer", sort=False):
        own = best[best["optimizer"] == name].set_index("seed")["eval_train_loss"]
        log_ratio = own.map(np.log) - reference.reindex(own.index).map(np.log)
        ratio, low, high = np.exp(interval(log_ratio))
        words = "" if name == base else f": {ratio:.2f}× [{low:.2f}, {high:.2f}]"
        spent = part.groupby("step")["gradient_evaluations"].transform("median")
        lr = rate(part["lr"].iloc[0], metrics.loc[metrics["optimizer"] == name, "lr"])
        label = f"{name} (η = {lr}){words}"
        line = style.band(axis, part.assign(cost=spent), "cost", "eval_train_loss", label=label)
        parts.append(line.assign(what="loss against cost", optimizer=name, lr=part["lr"].iloc[0]))
    budget = float(best["budget"].iloc[0])
    axis.axvline(budget, color="0.5", linestyle=":", linewidth=0.8)
    axis.set(xlabel="gradient-equivalents", ylabel="training loss", yscale="log")
    axis.set_title(f"loss relative to {base} at cost {budget:.0f}, 95 %", fontsize="small")
    return pd.concat(parts, ignore_index=True)


def scatter(axis: Axes, style: Style, table: pd.DataFrame, x: str, y: str, *, hollow: str | None = None) -> None:
    """Points coloured by step, filled but for those that the column ``hollow`` marks."""
    steps = sorted(table["step"].unique())
    empty = table[hollow] if hollow else pd.Series(False, index=table.index)
    for colour, step in zip(style.sequence(len(steps)), steps, strict=True):
        for face, label, chosen in ((colour, f"{step}", ~empty), ("none", None, empty)):
            part = table[(table["step"] == step) & chosen]
            if label or len(part):
                axis.plot(part[x], part[y], "o", color=colour, markerfacecolor=face, label=label, alpha=0.8)


def symmetric_log(axis: Axes, values: pd.Series, which: str) -> None:
    """A scale that is logarithmic on both sides of zero, linear below the smallest magnitudes of the values."""
    sizes = values.abs()[values.abs() > 0].dropna()
    low = float(sizes.quantile(0.05)) if len(sizes) else 1.0
    first, last = int(np.floor(np.log10(low))), int(np.floor(np.log10(sizes.max() if len(sizes) else 1.0)))
    getattr(axis, f"set_{which}scale")("symlog", linthresh=10.0**first)
    decades = 10.0 ** np.arange(last, first - 1, -max(1, -(-(last - first) // 2)))[::-1]  # few: both sides need room
    if which == "x" and len(decades) > 2 and values.min() < 0:
        decades = decades[1:]  # beside zero there is no room for three labels
    negative = -decades[decades <= -values.min()] if (values < 0).any() else decades[:0]
    getattr(axis, f"set_{which}ticks")([*negative[::-1], 0.0, *decades])


def same_scale(axis: Axes, x: pd.Series, y: pd.Series) -> None:
    """Both axes on one such scale, so that y = x is straight, with y = x drawn, and y = |x| dotted for x < 0."""
    both = pd.concat([x, y]).dropna()
    symmetric_log(axis, both, "x")
    symmetric_log(axis, both, "y")
    low, high = float(x.min()), float(x.max())
    side = np.geomspace(1e-6, max(abs(low), abs(high), 1e-5), 200)
    line = np.concatenate([-side[::-1], [0.0], side])
    line = line[(line >= min(low, 0.0)) & (line <= max(high, 0.0))]
    axis.plot(line, line, color="0.6", linewidth=0.8, zorder=0)
    axis.plot(line[line < 0], -line[line < 0], color="0.6", linestyle=":", linewidth=0.8, zorder=0)


def close_to_zero(values: pd.Series, wanted: float) -> float:
    """Half the width of a close-up: ``wanted``, or what it takes to show the three negative values nearest to zero."""
    sizes = values[values < 0].abs().sort_values().to_numpy()
    return float(max(wanted, 1.2 * sizes[min(2, len(sizes) - 1)])) if len(sizes) else wanted
