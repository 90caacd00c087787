"""The looks that all figures share, and how a figure is saved: PNG, PDF and the CSV it was drawn from.

Saved files are a function of the figure alone (no dates, no tool versions inside), so that drawing again from equal
tables gives equal bytes and nothing downstream reruns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")


@dataclass(frozen=True)
class Style:
    """The config's ``style`` block, and small helpers that every figure needs.

    dpi: of the PNG. width: of a one-panel figure, in inches; two panels and more are wider. font_size: in points.
    palette: a seaborn palette's name.
    """

    dpi: int = 150
    width: float = 4.8
    font_size: float = 10.0
    palette: str = "colorblind"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Matplotlib's settings while a figure is drawn and saved."""
        settings = {
            "font.size": self.font_size,
            "axes.titlesize": self.font_size,
            "axes.labelsize": self.font_size,
            "legend.fontsize": self.font_size - 1.5,
            "legend.title_fontsize": self.font_size - 1.5,
            "xtick.labelsize": self.font_size - 1.5,
            "ytick.labelsize": self.font_size - 1.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.4,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "lines.markersize": 4.0,
            "axes.prop_cycle": matplotlib.cycler(color=sns.color_palette(self.palette)),
            "svg.hashsalt": "curvspace",
            "pdf.fonttype": 42,
        }
        with sns.axes_style("whitegrid"), matplotlib.rc_context(settings):
            yield

    def panels(
        self, rows: int = 1, columns: int = 1, *, height: float | None = None, **options: Any
    ) -> tuple[Figure, np.ndarray]:
        """A figure and its (rows, columns) array of axes, laid out so that no labels overlap.

        ``height`` is that of one row in inches; further options go to ``Figure.subplots``.
        """
        width = self.width if columns == 1 else 0.75 * self.width * columns
        row = height or 0.72 * self.width / (1.0 if columns == 1 else 1.15)
        figure = Figure(figsize=(width, row * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)

    def colours(self, names: Iterable[Any]) -> dict[Any, tuple[float, float, float]]:
        """One colour for each name, in the order of their first appearance; for optimisers, classes, data sets."""
        distinct = list(dict.fromkeys(names))
        base = sns.color_palette(self.palette)
        palette = base if len(distinct) <= len(base) else sns.color_palette("husl", len(distinct))
        return dict(zip(distinct, palette, strict=False))

    def sequence(self, count: int) -> list[tuple[float, float, float]]:
        """Colours for ordered things (steps, learning rates, dimensions), dark to light."""
        return list(sns.color_palette("viridis", max(count, 1)))

    def band(
        self,
        axes: Axes,
        table: pd.DataFrame,
        x: str,
        y: str,
        *,
        label: str | None = None,
        colour: Any = None,
        low: float = 0.0,
        high: float = 1.0,
        **options: Any,
    ) -> pd.DataFrame:
        """Median of ``y`` over the rows of equal ``x`` (the seeds) as a line, quantiles low..high as a band.

        Returns what was drawn: columns x, median, low, high, n.
        """
        groups = table.dropna(subset=[y]).groupby(x)[y]
        drawn = pd.DataFrame(
            {"median": groups.median(), "low": groups.quantile(low), "high": groups.quantile(high), "n": groups.size()}
        ).reset_index()
        (line,) = axes.plot(drawn[x], drawn["median"], label=label, color=colour, **options)
        if (drawn["n"] > 1).any():
            axes.fill_between(drawn[x], drawn["low"], drawn["high"], color=line.get_color(), alpha=0.2, linewidth=0)
        return drawn

    def letter(self, axes: Iterable[Axes], letters: Sequence[str] = "abcdefghijklmnopqrstuvwxyz") -> None:
        """Marks panels (a), (b), … at their upper left."""
        for axis, mark in zip(axes, letters, strict=False):
            axis.set_title(f"({mark})", loc="left", fontsize=self.font_size, fontweight="bold")


def save(figure: Figure, table: pd.DataFrame, out: Path, dpi: int) -> list[Path]:
    """Writes ``out`` with .png, .pdf and .csv behind it; returns the three paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    png, pdf, csv = (out.with_name(out.name + suffix) for suffix in (".png", ".pdf", ".csv"))
    figure.savefig(png, dpi=dpi, metadata={"Software": None})
    figure.savefig(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
    table.to_csv(csv, index=False)
    return [png, pdf, csv]
