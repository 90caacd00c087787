"""Figures of the race: pure functions from tidy tables. A family of optimisers has one colour; rivals are grey."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.common.intervals import half_width
from papers.common.runs import Tables
from papers.common.style import Style, legend_below, palette_colours
from papers.race.tables import NETWORK, final_losses
from papers.race.tables import speed_ups as speed_up_table

Families = Sequence[tuple[str, str]]
"""(optimiser, family) in the order of the legend."""
RIVAL = "rival"
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
BELOW = 8
"""So many optimisers have their legend below the panels of X-R1, more have it beside them."""
ABREAST = 6
"""Panels of X-R3 in a row; a workload with more optimisers takes several."""


def looks(style: Style, families: Families) -> dict[str, dict[str, object]]:
    """Colour by family (rivals in greys), line and marker by the place within the family."""
    others = [family for family in dict.fromkeys(family for _, family in families) if family != RIVAL]
    colours = dict(zip(others, palette_colours(style.palette), strict=False))
    seen: dict[str, int] = {}
    found: dict[str, dict[str, object]] = {}
    for name, family in families:
        place = seen[family] = seen.get(family, -1) + 1
        grey = str(0.15 + 0.2 * (place % 4))
        found[name] = {
            "color": colours.get(family, grey),
            "linestyle": LINES[place % len(LINES)],
            "marker": MARKERS[place % len(MARKERS)],
        }
    return found


def horizons(tables: Tables, style: Style, families: Families) -> tuple[Figure, pd.DataFrame]:
    """X-R1: mean final validation loss against the length of training; each point is a run to the schedule's end.

    Bars are 95 % t-intervals over seeds, of two seeds their range. Each curve's points stand a little apart so that the
    bars can be told.
    """
    races = tables["races"]
    workloads = list(races.groupby(NETWORK, sort=False).groups)
    look = looks(style, families)
    figure, axes = style.panels(1, max(1, len(workloads)), height=3.1)
    drawn = []
    for axis, workload in zip(axes[0], workloads, strict=False):
        part = races[(races[NETWORK] == list(workload)).all(axis=1)]
        names = [name for name, _ in families if name in set(part["optimizer"])]
        for place, name in enumerate(names):
            table = final_losses(races, workload, name)
            if table.empty:
                continue
            h, losses = table.columns.to_numpy(float), table.to_numpy(float)
            shift = 1 + 0.012 * (place - len(names) / 2)
            mean = losses.mean(0)
            half = np.array([_half(column) for column in losses.T])
            axis.errorbar(h * shift, mean, yerr=half, label=name, capsize=2, elinewidth=0.8, **look[name])
            keys = dict(zip(NETWORK, workload, strict=True))
            columns = {"horizon": h, "val_loss": mean, "half_width": half, "seeds": len(losses)}
            drawn.append(pd.DataFrame(columns).assign(optimizer=name, family=dict(families)[name], **keys))
        ticks = sorted(part.loc[part["phase"] == "final", "horizon"].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set(title=_title(workload), xlabel="length of training (1: whole budget)", ylabel="final validation loss")
    handles, labels = _legend(axes[0])
    if len(labels) > BELOW:
        figure.set_size_inches(figure.get_figwidth() + 2, 4.4)
        figure.legend(handles, labels, loc="outside right upper")
    else:
        legend_below(figure, ncols=4)
    return figure, pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame(columns=[*NETWORK, "horizon"])


def _half(losses: np.ndarray) -> float:
    """Half of the 95 % t-interval, and of the range where there are but two (of two it reaches far below zero)."""
    return half_width(float(np.std(losses, ddof=1)), len(losses)) if len(losses) > 2 else float(np.ptp(losses)) / 2


def speed_ups(tables: Tables, style: Style, families: Families, against: Sequence[str]) -> tuple[Figure, pd.DataFrame]:
    """X-R2: speed-up in horizon over each rival, a dot an optimiser, a bar its 95 % bootstrap interval over seeds.

    An arrow marks a bound: the same loss lies beyond the shortest horizon.
    """
    table = speed_up_table(tables, against)
    workloads = list(table.groupby(NETWORK, sort=False).groups)
    look = looks(style, families)
    names = [name for name, _ in families if name in set(table["optimizer"])]
    rows = max(1, len(against))
    figure, axes = style.panels(rows, max(1, len(workloads)), height=0.7 + 0.24 * len(names), sharex="col", sharey=True)
    for (row, rival), (column, workload) in itertools.product(enumerate(against), enumerate(workloads)):
        axis = axes[row, column]
        part = table[(table[NETWORK] == list(workload)).all(axis=1) & (table["against"] == rival)]
        _dots(axis, part.set_index("optimizer"), names, look)
        axis.set_title(f"{_title(workload)}\nover {rival}")
        if row == rows - 1:
            axis.set_xlabel("speed-up in length of training (×)")
    return figure, table.assign(family=table["optimizer"].map(dict(families)))


def _dots(axis: Axes, rows: pd.DataFrame, names: Sequence[str], look: Mapping[str, Mapping[str, object]]) -> None:
    for y, name in enumerate(reversed(names)):
        if name not in rows.index:
            continue
        row, style = rows.loc[name], look[name]
        if np.isfinite(row["low"]):
            axis.plot([row["low"], row["high"]], [y, y], color=style["color"], linewidth=2)
        marker = (">" if row["speed_up"] > 1 else "<") if row["bound"] else style["marker"]
        axis.plot(row["speed_up"], y, linestyle="none", marker=marker, color=style["color"], markersize=6)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xscale("log")
    axis.axvline(1.0, color="0.3", linewidth=1)
    low, high = axis.get_xlim()
    marks = (0.25, 0.5, 1, 2, 4) if high > 6 * low else (0.5, 0.7, 0.85, 1, 1.2, 1.4, 2, 2.8)
    ticks = [t for t in marks if min(low, 0.9) <= t <= max(high, 1.1)]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


def tuning(tables: Tables, style: Style, families: Families) -> tuple[Figure, pd.DataFrame]:
    """X-R3: final loss of each trial against its learning rate; the ring is the setting that was run again.

    Trials that diverged, be it on one of several tuning seeds, are crosses at the upper edge. The ticks are the
    smallest and the largest rate tried.
    """
    races = tables["races"]
    tried = races[races["phase"] == "tuning"]
    ended = tried["val_loss"].where((tried["status"] == "finished") & np.isfinite(tried["val_loss"]))
    by = [*NETWORK, "optimizer", "trial", "lr"]
    means = tried.assign(val_loss=ended).groupby(by, sort=False)["val_loss"].agg(lambda loss: loss.mean(skipna=False))
    table = means.reset_index()
    best = races[races["phase"] == "final"].groupby([*NETWORK, "optimizer"])["trial"].first()
    table["chosen"] = [best.get(tuple(row[:4]), -1) == row[4] for row in table[by].itertuples(index=False)]
    look = looks(style, families)
    rows = []
    for workload in table.groupby(NETWORK, sort=False).groups:
        part = table[(table[NETWORK] == list(workload)).all(axis=1)]
        names = [name for name, _ in families if name in set(part["optimizer"])]
        rows += [(workload, part, names[i : i + ABREAST]) for i in range(0, len(names), ABREAST)]
    columns = max((len(names) for _, _, names in rows), default=1)
    figure, axes = style.panels(max(1, len(rows)), columns, height=1.9, sharey="row")
    figure.set_figwidth(1.5 * max(3, columns))
    for line, (workload, part, names) in zip(axes, rows, strict=False):
        for axis in line[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(line, names, strict=False):
            _trials(axis, part[part["optimizer"] == name], part["val_loss"].max(), look[name]["color"])
            axis.set_title(name.replace("-", "-\n", 1), fontsize="small")
        line[0].set_ylabel(f"{_title(workload)}\nfinal loss", fontsize="small")
    for line in axes[-1:]:
        for axis in line:
            axis.set_xlabel("learning rate")
    return figure, table


def _trials(axis: Axes, own: pd.DataFrame, worst: float, colour: object) -> None:
    fine, lost = own.dropna(subset=["val_loss"]), own[own["val_loss"].isna()]
    axis.plot(fine["lr"], fine["val_loss"], linestyle="none", marker="o", color=colour)
    axis.plot(lost["lr"], np.full(len(lost), worst), linestyle="none", marker="x", color="0.3")
    ring = fine[fine["chosen"]]
    axis.plot(ring["lr"], ring["val_loss"], linestyle="none", marker="o", mfc="none", mec="0.1", markersize=10)
    axis.set_xscale("log")
    ends = [float(f"{own['lr'].min():.1g}"), float(f"{own['lr'].max():.1g}")]
    axis.set_xticks(ends, [f"{end:g}" for end in ends])
    axis.minorticks_off()


def _legend(axes: Sequence[Axes]) -> tuple[list[Artist], list[str]]:
    """Each optimiser once, whichever panels it is in."""
    found: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _title(workload: Sequence[object]) -> str:
    return f"{workload[0]}, {workload[1]}"
