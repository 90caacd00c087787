"""The figure of A-R: curves by reading."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.a.figures import describe
from papers.a.readings import Pairs, judgements, score
from papers.common.runs import Tables
from papers.common.style import Colour, Style


def curves_by_reading(
    tables: Tables, style: Style, pairs: Pairs, above: float, shown: int = 6
) -> tuple[Figure, pd.DataFrame]:
    """A-R: validation loss by step, a row for each form of momentum and a column for each learning rate.

    SGD is black. The ``shown`` readings that meet most have a colour, the others are grey. Lines are medians over
    seeds; what leaves the top of a panel for good has diverged.
    """
    rates = tables["rates"]
    best = score(judgements(tables, pairs, above))["reading"].tolist()[:shown]
    colours = style.colours(best)
    lrs = sorted(rates["lr"].unique(), reverse=True)
    figure, axes = style.panels(len(pairs), len(lrs), height=2.6, sharey=True)
    drawn = []
    for row, (sgd, readings) in zip(axes, pairs.items(), strict=True):
        for axis, lr in zip(row, lrs, strict=True):
            part = rates[(rates["lr"] == lr) & rates["optimizer"].isin([sgd, *readings])]
            drawn.append(_panel(axis, part, [*readings, sgd], {**colours, sgd: (0.0, 0.0, 0.0)}, style))
            axis.get_lines()[-1].set_label("SGD with the same momentum")
            axis.set_title(f"η = {lr:g}, {sgd}")
    start = rates.loc[rates["step"] == 0, "val_loss"].median()
    axes[0, 0].set_ylim(0.9 * rates["val_loss"].min(), 1.6 * start)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{describe(rates)} (curves that leave the top for good have diverged)", fontsize=style.font_size)
    return figure, pd.concat(drawn, ignore_index=True)


def _panel(
    axis: Axes, runs: pd.DataFrame, names: Sequence[str], colours: dict[str, Colour], style: Style
) -> pd.DataFrame:
    drawn = []
    for name in names:
        part = runs[runs["optimizer"] == name]
        if part.empty:
            continue
        last = part["step"] == part.groupby("seed")["step"].transform("max")
        seen = part[part["val_loss"].notna() | last].fillna({"val_loss": math.inf})
        known = name in colours
        look = {"colour": colours[name], "label": name} if known else {"colour": "0.75", "linewidth": 0.7, "zorder": 1}
        band = style.band(axis, seen.replace({"val_loss": {math.inf: 1e6}}), "step", "val_loss", **look)
        drawn.append(band.assign(optimizer=name, lr=part["lr"].iloc[0]))
    return pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()
