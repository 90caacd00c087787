"""The figure: tables in, a figure and the table that was drawn out."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from papers.common.style import Style


def curves(tables: Mapping[str, pd.DataFrame], style: Style) -> tuple[Figure, pd.DataFrame]:
    """Training loss against step: the median over the seeds, and their range as a band."""
    runs = tables["runs"]
    figure, ((axes,),) = style.panels()
    colours = style.colours(runs["optimizer"])
    drawn = []
    for (optimizer, lr), table in runs.groupby(["optimizer", "lr"], sort=False):
        line = style.band(
            axes, table, "step", "eval_train_loss", label=f"{optimizer}, η = {lr:g}", colour=colours[optimizer]
        )
        drawn.append(line.assign(optimizer=optimizer, lr=lr))
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    figure.legend(loc="outside lower center")
    return figure, pd.concat(drawn, ignore_index=True)
