"""Figures of the tournament: pure functions from tidy tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.common.runs import NETWORK, Tables
from papers.common.style import Style, below, legend_below, rate
from papers.tournament.tables import ranking, speed_ups, stable_rates, targets

UNIT_LABELS = {"steps": "steps", "gradient_evaluations": "gradient-equivalents"}
"""What is drawn of a speed-up. Seconds are in the table alone: races ran beside other work, at different times."""
CLIP = 1.1
"""Losses above this multiple of the untrained network's are crosses at the upper edge."""


def curves(tables: Tables, style: Style, reference: str, column: str = "val_loss") -> tuple[Figure, pd.DataFrame]:
    """A-X2-curves: loss of each optimiser at its best rate, against steps (above) and gradient-equivalents (below).

    Median over seeds, band their range; the dotted line is the target of the speed-ups; † a rate at its grid's edge.
    """
    races = tables["races"]
    final = races[races["phase"] == "final"]
    networks = list(races.groupby(NETWORK, sort=False).groups)
    looks = style.looks(races["optimizer"])
    goal = targets(races, reference, column)
    figure, axes = style.panels(2, len(networks), height=2.7 + 0.11 * len(looks), sharey="col")
    drawn = []
    for place, network in enumerate(networks):
        part = final[(final[NETWORK] == list(network)).all(axis=1)]
        start = part.loc[part["step"] == 0, column].median()
        for row, x in enumerate(("step", "gradient_evaluations")):
            axis = axes[row, place]
            for name, own in part.groupby("optimizer", sort=False):
                tried = races[(races[NETWORK] == list(network)).all(axis=1) & (races["optimizer"] == name)]["lr"]
                label = f"{name} ({rate(own['lr'].iloc[0], tried)})"
                # Seeds may pay differently for the same step: their evaluations meet at the mean of what it cost.
                shown = own.assign(x=own.groupby("step")[x].transform("mean"))
                shown = shown.fillna({column: np.inf})
                band = style.band(axis, shown, "x", column, label=label, limit=CLIP * start, **looks[name])
                drawn.append(band.assign(optimizer=name, against=x, **_named(network)))
            if network in goal.index:
                axis.axhline(goal[network], color="0.3", linestyle=":", linewidth=1)
            axis.set(xlabel=UNIT_LABELS.get(x, "step"), ylabel=column.replace("val_", "validation "), xlim=(0, None))
        most = part.loc[part["optimizer"] == reference, "gradient_evaluations"].max()
        if np.isfinite(most):  # the reference itself may have diverged everywhere
            axes[1, place].set_xlim(0, 2.0 * most)
        axes[0, place].set_title(_title(network))
        if not part.empty:
            below(axes[1, place], title="optimiser (its η)", fontsize="x-small")
    columns = ["x", "median", "low", "high", "n", "optimizer", "against", *NETWORK]
    return figure, pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame(columns=columns)


def speed_up_bars(
    tables: Tables, style: Style, reference: str, against: list[str], column: str = "val_loss"
) -> tuple[Figure, pd.DataFrame]:
    """A-X2-speedup: speed-up over each rival to the target, in steps and gradient-equivalents.

    The interval is 95 % over seeds; an arrow to the left marks an upper bound (not every run got there), one to the
    right a lower bound (not every run of the rival's did).
    """
    table = speed_ups(tables, reference, against, column)
    networks = list(table.groupby(NETWORK, sort=False).groups)
    height = 0.75 + 0.26 * table["optimizer"].nunique()
    figure, axes = style.panels(len(against), max(1, len(networks)), height=height, sharex=True)
    for place, network in enumerate(networks):
        for row, rival in enumerate(against):
            chosen = (table[NETWORK] == list(network)).all(axis=1) & (table["against"] == rival)
            part = table[chosen & (table["optimizer"] != rival)]
            order = part[part["unit"] == "steps"].sort_values("speed_up")["optimizer"].tolist()
            _bars(axes[row, place], part, order, style)
            last = row == len(against) - 1
            title = f"{network[0]}, {network[1]}\nagainst {rival}"
            axes[row, place].set(title=title, xlabel="speed-up" if last else "")
    if networks:
        _ratio_axis(axes[0, 0], table[table["unit"].isin(UNIT_LABELS)])
        legend_below(figure)
    return figure, table


def _bars(axis: Axes, part: pd.DataFrame, order: Sequence[str], style: Style) -> None:
    """Two thin bars an optimiser, growing from 1."""
    colours = style.colours(UNIT_LABELS)
    for offset, (unit, label) in zip((0.19, -0.19), UNIT_LABELS.items(), strict=True):
        rows = part[part["unit"] == unit].set_index("optimizer").reindex(order)
        if rows["speed_up"].isna().all():  # not measured (wall-clock of a shared machine, say)
            continue
        y = np.arange(len(order)) + offset
        value = rows["speed_up"].to_numpy(float)
        axis.barh(y, value - 1, left=1, height=0.36, color=colours[unit], label=label)
        error = np.abs(np.stack([value - rows["low"], rows["high"] - value]).astype(float))
        axis.errorbar(value, y, xerr=np.nan_to_num(error), fmt="none", ecolor="0.2", elinewidth=0.9, capsize=2)
        for name, marker in (("bound", "<"), ("bound_below", ">")):
            bound = rows[name].fillna(False).to_numpy(bool)
            axis.plot(value[bound], y[bound], linestyle="none", marker=marker, color="0.2", markersize=4)
    axis.axvline(1.0, color="0.2", linewidth=1)
    axis.set_yticks(range(len(order)), order)


def _ratio_axis(axis: Axes, table: pd.DataFrame) -> None:
    """A logarithmic axis around 1 that holds all ratios of the panels which share it, whiskers up to thirty-fold."""
    axis.set_xscale("log")
    values = pd.concat([table["speed_up"], table["low"], table["high"]]).replace([0, np.inf], np.nan).dropna()
    limit = 1.15 * float(np.exp(np.abs(np.log(values.clip(1 / 30, 30))).max())) if len(values) else 2.0
    axis.set_xlim(1 / limit, limit)
    marks = (0.2, 0.5, 1, 2, 5) if limit < 9 else (0.05, 0.2, 1, 5, 20)
    ticks = [t for t in marks if 1 / limit <= t <= limit]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()


def stability_ladder(tables: Tables, style: Style, reference: str) -> tuple[Figure, pd.DataFrame]:
    """A-X3: the largest stable learning rate, one rung an optimiser; dots are seeds, the bar their geometric mean.

    The dashed line is the reference's; the number beside a rung is the ratio to it. An arrow marks a seed for which
    the largest rate of the grid was stable.
    """
    table = stable_rates(tables, reference)
    seeds = tables["stability"]
    networks = list(table.groupby(NETWORK, sort=False).groups)
    height = 0.9 + 0.26 * table["optimizer"].nunique()
    figure, axes = style.panels(1, len(networks), height=height, sharex=True)
    for axis, network in zip(axes[0], networks, strict=True):
        part = table[(table[NETWORK] == list(network)).all(axis=1)].iloc[::-1].reset_index(drop=True)
        here = seeds[(seeds[NETWORK] == list(network)).all(axis=1)]
        for y, row in part.iterrows():
            own = here[here["optimizer"] == row["optimizer"]]
            beyond = own["unstable_lr"].isna() & own["stable_lr"].notna()
            axis.plot(own["stable_lr"], [y] * len(own), "o", color="C0", alpha=0.7)
            axis.plot(own.loc[beyond, "stable_lr"] * 1.25, [y] * int(beyond.sum()), ">", color="C0")
            axis.plot(row["stable_lr"], y, "|", color="0.15", markersize=13, markeredgewidth=1.5)
            note = f"{row['ratio']:.2g}×" if np.isfinite(row["stable_lr"]) else "× none stable"
            axis.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize="x-small")
        base = part.loc[part["optimizer"] == reference, "stable_lr"]
        if len(base):
            axis.axvline(base.iloc[0], color="0.3", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(part)), part["optimizer"])
        axis.set_ylim(-0.6, len(part) - 0.4)
        axis.set(xlabel="largest stable η", title=_title(network))
    found = seeds["stable_lr"].dropna()
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xlim(min([0.01, *found / 2]), max([1.0, *found * 2]))
    return figure, table


def ablation_bars(
    tables: Tables, style: Style, reference: str, full: str, column: str = "val_loss"
) -> tuple[Figure, pd.DataFrame]:
    """A-X4: the loss at the end of the budget when one part of the method is changed, each at its own best rate.

    ``full`` is the unchanged method (dashed line); the grey line is the untrained network, and a loss, or an end of an
    interval, beyond it is an arrow at the edge.
    """
    races = tables["races"]
    table = ranking(tables, reference, column)
    networks = list(table.groupby(NETWORK, sort=False).groups)
    order = list(dict.fromkeys(races["optimizer"]))[::-1]
    figure, axes = style.panels(1, len(networks), height=0.9 + 0.3 * len(order))
    for axis, network in zip(axes[0], networks, strict=True):
        rows = table[(table[NETWORK] == list(network)).all(axis=1)].set_index("optimizer").reindex(order)
        start = races.loc[(races[NETWORK] == list(network)).all(axis=1) & (races["step"] == 0), column].median()
        edge = 1.15 * start
        for y, name in enumerate(order):
            colour = {full: "C0", reference: "C1"}.get(name, "0.4")
            _interval(axis, y, rows.loc[name, [column, f"{column}_low", f"{column}_high"]], edge, colour)
            axis.annotate(
                _best(rows.loc[name]), (1.05, y), xycoords=("axes fraction", "data"), va="center", fontsize="x-small"
            )
        axis.axvline(start, color="0.6", linewidth=1)
        if full in rows.index:
            axis.axvline(rows.loc[full, column], color="C0", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(order)), order)
        axis.set(xlabel=f"final {column.replace('val_', 'validation ')}", title=_title(network), xlim=(0, edge))
    return figure, table


def _interval(axis: Axes, y: int, values: pd.Series, edge: float, colour: str) -> None:
    """A dot with its interval; what lies beyond the edge, or is not finite, is an arrow there."""
    mean, low, high = (float(value) for value in values)
    mean = mean if np.isfinite(mean) else np.inf
    low, high = (mean if np.isnan(end) else end for end in (low, high))  # of one seed: no interval
    if mean < edge:
        axis.plot([max(low, 0.0), min(high, edge)], [y, y], color=colour)
        axis.plot([mean], [y], "o", color=colour, markersize=6)
    if max(mean, high) >= edge:
        axis.plot([edge], [y], ">", color=colour, clip_on=False)


def _best(row: pd.Series) -> str:
    if not np.isfinite(row["best_lr"]):
        return "× diverged at every η"
    lost = f", {row['diverged']:.0f} of {row['seeds']:.0f} × diverged" if row["diverged"] else ""
    return f"η = {row['best_lr']:g}{'†' if row['edge'] else ''}{lost}"


def _named(network: tuple) -> dict[str, object]:
    return dict(zip(NETWORK, network, strict=True))


def _title(network: tuple) -> str:
    dataset, model, batch = network
    return f"{dataset}, {model}\nbatch {batch}"
