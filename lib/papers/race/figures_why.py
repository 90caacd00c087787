"""Figures of what decides between the explanations: pure functions from tidy tables."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from papers.common.style import Style, below, legend_below

Tables = dict[str, pd.DataFrame]
NETWORK = ["dataset", "model"]
LINES = ("-", "--", ":", "-.")


def mean_shares(tables: Tables, style: Style) -> tuple[Figure, pd.DataFrame]:
    """X-R5: the share in the units' mean directions along training, a panel a network; dotted grey: a random span's."""
    table = tables["shares"]
    networks = list(table.groupby(NETWORK, sort=False).groups)
    columns = min(5, max(1, len(networks)))
    figure, axes = style.panels(-(-max(1, len(networks)) // columns), columns, height=2.9, sharey=True)
    quantities = list(dict.fromkeys(table["quantity"]))
    colours = style.colours(quantities)
    lines = dict(zip(quantities, itertools.cycle(("-", "--")), strict=False))
    for axis in axes.flat[len(networks) :]:
        axis.set_axis_off()
    for axis, network in zip(axes.flat, networks, strict=False):
        part = table[(table[NETWORK] == list(network)).all(axis=1)]
        for name, own in part.groupby("quantity", sort=False):
            look = {"color": colours[name], "linestyle": lines[name], "label": name}
            axis.plot(own["step"] + 1, own["value"], marker="o", markersize=3, **look)
        null = part.loc[part["quantity"] == "gradient", "null"].iloc[0]
        axis.axhline(null, color="0.4", linestyle=":", linewidth=1.2, label="random span, in mean directions")
        axis.set(title=f"{network[0]}, {network[1]}", xlabel="step + 1", xscale="log", ylim=(0, 1))
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the square")
    legend_below(figure, ncols=4, fontsize="small")
    return figure, table


def annealed(tables: Tables, style: Style, reference: str) -> tuple[Figure, pd.DataFrame]:
    """X-R6: each optimiser's lead over the reference at a checkpoint, before and after the rate has gone to zero.

    Mean over seeds; ``surviving`` is the lead after over the lead before.
    """
    table = leads(tables, reference)
    networks = list(table.groupby(NETWORK, sort=False).groups)
    figure, axes = style.panels(1, max(1, len(networks)), height=3.1)
    colours = style.colours(table["optimizer"])
    for axis, network in zip(axes[0], networks, strict=False):
        part = table[(table[NETWORK] == list(network)).all(axis=1)]
        for name, own in part.groupby("optimizer", sort=False):
            axis.plot(own["step"], own["lead"], color=colours[name], marker="o", label=f"{name}, at its rate")
            axis.plot(
                own["step"], own["annealed_lead"], color=colours[name], linestyle="--", marker="s", label="... annealed"
            )
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set(
            title=f"{network[0]}, {network[1]}", xlabel="step", ylabel=f"lead in validation loss\nover {reference}"
        )
        below(axis, fontsize="x-small")
    return figure, table


def leads(tables: Tables, reference: str) -> pd.DataFrame:
    """One row per network, optimiser and step: the lead over the reference, annealed too, and the surviving share.

    Means over the seeds that both have there.
    """
    runs = tables["branches"][[*NETWORK, "optimizer", "seed", "step", "val_loss", "annealed_val_loss"]].dropna()
    base = runs[runs["optimizer"] == reference].drop(columns="optimizer")
    pairs = runs[runs["optimizer"] != reference].merge(base, on=[*NETWORK, "seed", "step"], suffixes=("", "_reference"))
    both = pairs.drop(columns="seed").groupby([*NETWORK, "optimizer", "step"], sort=False).mean().reset_index()
    both["lead"] = both["val_loss_reference"] - both["val_loss"]
    both["annealed_lead"] = both["annealed_val_loss_reference"] - both["annealed_val_loss"]
    both["surviving"] = (both["annealed_lead"] / both["lead"]).where(both["lead"].abs() > 1e-3, np.nan)
    return both
