"""Figures of the tournament: pure functions from tidy tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from papers.common.runs import NETWORK, Tables
from papers.common.style import Style
from papers.tournament.tables import ranking, speed_ups, stable_rates, targets

UNIT_LABELS = {"steps": "steps", "gradient_evaluations": "gradient-equivalents", "seconds": "seconds"}
CLIP = 1.1
"""Losses above this multiple of the untrained network's are not drawn: such runs have diverged."""


def curves(tables: Tables, style: Style, reference: str, column: str = "val_loss") -> tuple[Figure, pd.DataFrame]:
    """A-X2-curves: loss of each optimiser at its best rate, against steps (above) and gradient-equivalents (below).

    Median over seeds, band their range; the dotted line is the target of the speed-ups.
    """
    races = tables["races"]
    final = races[races["phase"] == "final"]
    networks = list(races.groupby(NETWORK, sort=False).groups)
    looks = style.looks(races["optimizer"])
    goal = targets(races, reference, column)
    figure, axes = style.panels(2, len(networks), height=2.7 + 0.09 * len(looks), sharey="col")
    drawn = []
    for place, network in enumerate(networks):
        part = final[(final[NETWORK] == list(network)).all(axis=1)]
        start = part.loc[part["step"] == 0, column].median()
        for row, x in enumerate(("step", "gradient_evaluations")):
            axis = axes[row, place]
            for name, own in part.groupby("optimizer", sort=False):
                label = f"{name} ({own['lr'].iloc[0]:g})"
                # Seeds may pay differently for the same step: their evaluations meet at the mean of what it cost.
                shown = own.assign(x=own.groupby("step")[x].transform("mean"))
                shown = shown[shown[column] <= CLIP * start]
                band = style.band(axis, shown, "x", column, label=label, **looks[name])
                drawn.append(band.assign(optimizer=name, against=x, **_named(network)))
            if network in goal.index:
                axis.axhline(goal[network], color="0.3", linestyle=":", linewidth=1)
            axis.set(xlabel=UNIT_LABELS.get(x, "step"), ylabel=column.replace("val_", "validation "), xlim=(0, None))
        most = part.loc[part["optimizer"] == reference, "gradient_evaluations"].max()
        if np.isfinite(most):  # the reference itself may have diverged everywhere
            axes[1, place].set_xlim(0, 2.0 * most)
        axes[0, place].set_title(_title(network))
        if not part.empty:
            below = (0.5, -0.22)
            axes[1, place].legend(
                title="optimiser (its η)", fontsize="x-small", loc="upper center", bbox_to_anchor=below
            )
    columns = ["x", "median", "low", "high", "n", "optimizer", "against", *NETWORK]
    return figure, pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame(columns=columns)


def speed_up_bars(
    tables: Tables, style: Style, reference: str, against: list[str], column: str = "val_loss"
) -> tuple[Figure, pd.DataFrame]:
    """A-X2-speedup: speed-up over each rival to the target, in steps, gradient-equivalents and seconds.

    The interval is 95 % over seeds; an arrow to the left marks an upper bound (not every run got there).
    """
    table = speed_ups(tables, reference, against, column)
    networks = list(table.groupby(NETWORK, sort=False).groups)
    figure, axes = style.panels(len(against), max(1, len(networks)), height=0.55 + 0.36 * table["optimizer"].nunique())
    for place, network in enumerate(networks):
        for row, rival in enumerate(against):
            chosen = (table[NETWORK] == list(network)).all(axis=1) & (table["against"] == rival)
            part = table[chosen & (table["optimizer"] != rival)]
            order = part[part["unit"] == "steps"].sort_values("speed_up")["optimizer"].tolist()
            _bars(axes[row, place], part, order, style)
            axes[row, place].set(
                title=f"{network[0]}, {network[1]}\nagainst {rival}", xlabel="speed-up (×), logarithmic"
            )
    if networks:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, table


def _bars(axis: Axes, part: pd.DataFrame, order: Sequence[str], style: Style) -> None:
    """Three thin bars an optimiser, growing from 1."""
    colours = style.colours(UNIT_LABELS)
    for offset, (unit, label) in zip((0.26, 0.0, -0.26), UNIT_LABELS.items(), strict=True):
        rows = part[part["unit"] == unit].set_index("optimizer").reindex(order)
        if rows["speed_up"].isna().all():  # not measured (wall-clock of a shared machine, say)
            continue
        y = np.arange(len(order)) + offset
        value = rows["speed_up"].to_numpy(float)
        axis.barh(y, value - 1, left=1, height=0.24, color=colours[unit], label=label)
        error = np.abs(np.stack([value - rows["low"], rows["high"] - value]).astype(float))
        axis.errorbar(value, y, xerr=np.nan_to_num(error), fmt="none", ecolor="0.2", elinewidth=0.9, capsize=2)
        bound = rows["bound"].fillna(False).to_numpy(bool)
        axis.plot(value[bound], y[bound], linestyle="none", marker="<", color="0.2", markersize=4)
    axis.set_xscale("log")
    axis.axvline(1.0, color="0.2", linewidth=1)
    values = pd.concat([part["speed_up"], part["low"], part["high"]]).replace([0, np.inf], np.nan).dropna()
    limit = float(np.exp(np.abs(np.log(values.clip(1 / 30, 30))).max())) if len(values) else 2.0
    axis.set_xlim(1 / (1.15 * limit), 1.15 * limit)
    marks = (0.2, 0.5, 1, 2, 5) if limit < 8 else (0.05, 0.2, 1, 5, 20)
    ticks = [t for t in marks if 1 / (1.15 * limit) <= t <= 1.15 * limit]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(order)), order)


def stability_ladder(tables: Tables, style: Style, reference: str) -> tuple[Figure, pd.DataFrame]:
    """A-X3: the largest stable learning rate, one rung an optimiser; dots are seeds, the cross their mean.

    The dashed line is the reference's; the number beside a rung is the ratio to it.
    """
    table = stable_rates(tables, reference)
    seeds = tables["stability"]
    networks = list(table.groupby(NETWORK, sort=False).groups)
    height = 0.9 + 0.26 * table["optimizer"].nunique()
    figure, axes = style.panels(1, len(networks), height=height)
    colours = style.colours(seeds["optimizer"])
    for axis, network in zip(axes[0], networks, strict=True):
        part = table[(table[NETWORK] == list(network)).all(axis=1)].iloc[::-1].reset_index(drop=True)
        for y, row in part.iterrows():
            own = seeds[(seeds[NETWORK] == list(network)).all(axis=1) & (seeds["optimizer"] == row["optimizer"])]
            axis.plot(own["stable_lr"], [y] * len(own), "o", color=colours[row["optimizer"]], alpha=0.6)
            axis.plot(row["stable_lr"], y, "x", color="0.15", markersize=6)
            note = f"{row['ratio']:.2g}×" if np.isfinite(row["stable_lr"]) else "at no rate of the grid"
            axis.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize="x-small")
        base = part.loc[part["optimizer"] == reference, "stable_lr"]
        if len(base):
            axis.axvline(base.iloc[0], color="0.3", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        found = seeds.loc[(seeds[NETWORK] == list(network)).all(axis=1), "stable_lr"].dropna()
        axis.set_xlim(min([0.01, *found / 2]), max([1.0, *found * 2]))
        axis.set_yticks(range(len(part)), part["optimizer"])
        axis.set_ylim(-0.6, len(part) - 0.4)
        axis.set(xlabel="largest stable η", title=_title(network))
    return figure, table


def ablation_bars(
    tables: Tables, style: Style, reference: str, full: str, column: str = "val_loss"
) -> tuple[Figure, pd.DataFrame]:
    """A-X4: the loss at the end of the budget when one part of the method is changed, each at its own best rate.

    ``full`` is the unchanged method (dashed line); the solid grey line is the untrained network.
    """
    races = tables["races"]
    table = ranking(tables, reference, column)
    networks = list(table.groupby(NETWORK, sort=False).groups)
    order = list(dict.fromkeys(races["optimizer"]))[::-1]
    figure, axes = style.panels(1, len(networks), height=0.9 + 0.3 * len(order))
    for axis, network in zip(axes[0], networks, strict=True):
        rows = table[(table[NETWORK] == list(network)).all(axis=1)].set_index("optimizer").reindex(order)
        start = races.loc[(races[NETWORK] == list(network)).all(axis=1) & (races["step"] == 0), column].median()
        value = rows[column].to_numpy(float)
        colours = ["C0" if name == full else "C1" if name == reference else "0.65" for name in order]
        axis.barh(range(len(order)), value, color=colours)
        error = np.stack([value - rows[f"{column}_low"], rows[f"{column}_high"] - value]).astype(float)
        axis.errorbar(value, range(len(order)), xerr=np.nan_to_num(error), fmt="none", ecolor="0.2", capsize=2)
        for y, name in enumerate(order):
            lr = rows.loc[name, "best_lr"]
            note = f"η = {lr:g}" if np.isfinite(lr) else "diverged at every η"
            axis.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize="x-small")
        axis.axvline(start, color="0.6", linewidth=1)
        if full in rows.index:
            axis.axvline(rows.loc[full, column], color="C0", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(order)), order)
        axis.set(xlabel=f"final {column.replace('val_', 'validation ')}", title=_title(network), xlim=(0, 1.08 * start))
    return figure, table


def _named(network: tuple) -> dict[str, object]:
    return dict(zip(NETWORK, network, strict=True))


def _title(network: tuple) -> str:
    dataset, model, batch = network
    return f"{dataset}, {model}\nbatch {batch}"
