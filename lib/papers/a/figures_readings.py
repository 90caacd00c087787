"""The figure of A-R: curves by reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.a.figures import describe, known_or_diverged
from papers.a.readings import Pairs, judgements, score
from papers.common.runs import Tables
from papers.common.style import Colour, Style, legend_below

GREY: dict[str, Any] = {"colour": "0.75", "linewidth": 0.7, "zorder": 1}


def curves_by_reading(
    tables: Tables, style: Style, pairs: Pairs, above: float, shown: int = 6
) -> tuple[Figure, pd.DataFrame]:
    """A-R: validation loss by step, a row for each form of momentum and a column for each learning rate.

    SGD is black. The ``shown`` readings that meet most have a colour, the others are grey. Lines are medians over
    seeds; a cross at the upper edge is a loss above the scale. ``judged``, if given, are the judgements already made.
    """
    rates = tables["rates"]
    judged = tables["judged"] if "judged" in tables else judgements(tables, pairs, above)
    best = score(judged)["reading"].tolist()[:shown]
    colours = style.colours(best)
    lrs = sorted(rates["lr"].unique(), reverse=True)
    figure, axes = style.panels(len(pairs), len(lrs), height=2.6, sharey=True)
    limit = 1.6 * rates.loc[rates["step"] == 0, "val_loss"].median()
    drawn = []
    for row, (sgd, readings) in zip(axes, pairs.items(), strict=True):
        for axis, lr in zip(row, lrs, strict=True):
            part = rates[(rates["lr"] == lr) & rates["optimizer"].isin([sgd, *readings])]
            drawn.append(_panel(axis, part, [*readings, sgd], {**colours, sgd: (0.0, 0.0, 0.0)}, style, limit))
            axis.set_title(f"η = {lr:g}, {sgd}")
    axes[0, 0].set_ylim(0.9 * rates["val_loss"].min(), limit)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    legend_below(figure, ncols=3)
    figure.suptitle(describe(rates), fontsize=style.font_size)
    return figure, pd.concat(drawn, ignore_index=True)


def _panel(
    axis: Axes, runs: pd.DataFrame, names: Sequence[str], colours: dict[str, Colour], style: Style, limit: float
) -> pd.DataFrame:
    drawn = []
    for name in names:
        part = runs[runs["optimizer"] == name]
        if part.empty:
            continue
        label = "SGD with the same momentum" if name == names[-1] else name
        look = {"colour": colours[name], "label": label} if name in colours else GREY
        seen = known_or_diverged(part, "val_loss")
        drawn.append(style.band(axis, seen, "step", "val_loss", limit=limit, **look).assign(optimizer=name))
        drawn[-1]["lr"] = part["lr"].iloc[0]
    return pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()
