"""The looks that all figures share, and how a figure is saved: PNG, PDF and the CSV it was drawn from.

Saved files are a function of the figure alone (no dates, no tool versions inside), so that drawing again from equal
tables gives equal bytes and nothing downstream reruns.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

matplotlib.use("Agg")

Colour = tuple[float, float, float]
BUILT_IN = {"colorblind": "seaborn-v0_8-colorblind", "deep": "seaborn-v0_8-deep", "muted": "seaborn-v0_8-muted"}
"""seaborn's palettes that matplotlib has too; any other is asked of seaborn, whose import doubles a figure's time."""
GRID = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.3",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.8",
    "grid.linewidth": 0.5,
    "legend.frameon": True,
    "legend.framealpha": 0.75,
    "legend.edgecolor": "none",
}

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def palette_colours(name: str, count: int | None = None) -> list[Colour]:
    """The colours of a palette by seaborn's name; ``count`` of them where it makes as many as asked for."""
    if name in BUILT_IN:
        colours = matplotlib.style.library[BUILT_IN[name]]["axes.prop_cycle"].by_key()["color"]
        return [matplotlib.colors.to_rgb(colour) for colour in colours]
    import seaborn

    return list(seaborn.color_palette(name, count))


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
        settings: dict[Any, Any] = {
            **GRID,
            "font.size": self.font_size,
            "axes.titlesize": self.font_size,
            "axes.labelsize": self.font_size,
            "legend.fontsize": self.font_size - 1.5,
            "legend.title_fontsize": self.font_size - 1.5,
            "xtick.labelsize": self.font_size - 1.5,
            "ytick.labelsize": self.font_size - 1.5,
            "lines.linewidth": 1.4,
            "lines.markersize": 4.0,
            "axes.prop_cycle": cycler(color=palette_colours(self.palette)),
            "svg.hashsalt": "curvspace",
            "pdf.fonttype": 42,
        }
        with matplotlib.rc_context(settings):
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

    def colours(self, names: Iterable[Any]) -> dict[Any, Colour]:
        """One colour for each name, in the order of their first appearance; for optimisers, classes, data sets.

        More names than the palette has colours: darker, then lighter ones of the same hues (see :meth:`looks`).
        """
        distinct = list(dict.fromkeys(names))
        base = palette_colours(self.palette)
        shades = [_shade(base[i % len(base)], i // len(base)) for i in range(len(distinct))]
        return dict(zip(distinct, shades, strict=True))

    def looks(self, names: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        """Colour and line style of each name, told apart by who sees no hue: dashes change where a hue comes again."""
        colours = self.colours(names)
        families = len(palette_colours(self.palette))
        return {
            name: {"colour": colour, "linestyle": DASHES[i // families % len(DASHES)]}
            for i, (name, colour) in enumerate(colours.items())
        }

    def sequence(self, count: int) -> list[Colour]:
        """Colours for ordered things (steps, learning rates, dimensions), dark to light."""
        return _spread("viridis", count)

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
        limit: float = math.inf,
        **options: Any,
    ) -> pd.DataFrame:
        """Median of ``y`` over the rows of equal ``x`` (the seeds) as a line, quantiles low..high as a band.

        Where fewer seeds are left than elsewhere, the marker is hollow. A median above ``limit``, or infinite, is no
        part of the line but a cross at the limit: the run has diverged there.
        Returns what was drawn: columns x, median, low, high, n.
        """
        groups = table.dropna(subset=[y]).groupby(x)[y]
        ends = {"low": low, "high": high}
        quantiles = {name: groups.quantile(share, interpolation="nearest") for name, share in ends.items()}
        drawn = pd.DataFrame({"median": groups.median(), **quantiles, "n": groups.size()}).reset_index()
        gone = ~(drawn["median"] <= limit) | np.isinf(drawn["median"])
        (line,) = axes.plot(drawn[x], drawn["median"].mask(gone), label=label, color=colour, **options)
        colour, place = line.get_color(), line.get_zorder()
        if (drawn["n"] > 1).any():
            band = drawn[["low", "high"]].clip(upper=limit).where(np.isfinite)
            axes.fill_between(drawn[x], band["low"], band["high"], color=colour, alpha=0.2, linewidth=0)
        fewer = drawn[(drawn["n"] < drawn["n"].max()) & ~gone]
        axes.plot(fewer[x], fewer["median"], "o", color=colour, markerfacecolor="white", zorder=place + 0.1)
        if gone.any():
            top = limit if np.isfinite(limit) else drawn.loc[~gone, "median"].max()
            marks = np.full(int(gone.sum()), top)
            axes.plot(drawn.loc[gone, x], marks, "x", color=colour, markersize=6, clip_on=False, zorder=place + 0.1)
        return drawn

    def letter(self, axes: Iterable[Axes], letters: Sequence[str] = "abcdefghijklmnopqrstuvwxyz") -> None:
        """Marks panels (a), (b), … at their upper left."""
        for axis, mark in zip(axes, letters, strict=False):
            axis.set_title(f"({mark})", loc="left", fontsize=self.font_size, fontweight="bold")


def legend_below(figure: Figure, *, ncols: int = 3, **options: Any) -> None:
    """One legend for all panels, below them: each label once, as its first panel draws it.

    In at most ``ncols`` columns, and in no more than the figure is wide; ``options`` go to ``Figure.legend``.
    """
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for columns in range(ncols, 0, -1):
        legend = figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, **options)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def beside(axes: Axes, **options: Any) -> None:
    """A panel's legend right of it, outside the data."""
    axes.legend(**{"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, **options})


def below(axes: Axes, **options: Any) -> None:
    """A panel's own legend below its label, outside the data; none of a panel without any."""
    figure = axes.get_figure()
    assert figure is not None
    place = axes.transAxes + ScaledTranslation(0, -38 / 72, figure.dpi_scale_trans)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": place, **options})


def early_steps(axes: Axes, linear: float = 10.0) -> None:
    """An axis of steps which gives the first ones room: linear to ``linear``, logarithmic from there."""
    axes.set_xscale("symlog", linthresh=linear, linscale=0.4)
    axes.set_xlim(left=0)
    last = axes.get_xlim()[1]
    decades = [10.0**power for power in range(1, 8) if linear <= 10.0**power <= last]
    axes.set_xticks([0, *decades], ["0", *(f"{decade:,.0f}" for decade in decades)])


def line_through(count: int) -> str:
    """The line style of so many measured points: two points are no curve, and are not joined."""
    return "-" if count > 2 else "none"


def rate(lr: float, grid: Iterable[float]) -> str:
    """A learning rate in words, with † where it is an end of the grid of several that it was chosen from."""
    tried = sorted(set(grid))
    return f"{lr:g}" + ("†" if len(tried) > 1 and lr in (tried[0], tried[-1]) else "")


def _shade(colour: Colour, turn: int) -> Colour:
    """The colour itself, then by turns darker and lighter ones of its hue, ever farther."""
    if turn == 0:
        return colour
    hue, light, saturation = colorsys.rgb_to_hls(*colour)
    away = 0.45 ** ((turn + 1) // 2)
    return colorsys.hls_to_rgb(hue, light * away if turn % 2 else 1 - (1 - light) * away, saturation)


def plain_ticks(figure: Figure) -> None:
    """Logarithmic axes: 2, 5, 20 in place of 2 × 10⁰ on less than a decade and a half, else powers of ten alone.

    An axis whose formatter a figure has chosen itself is left as it is.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "log" or type(axis.get_major_formatter()) is not LogFormatterSciNotation:
                continue
            low, high = sorted(axis.get_view_interval())
            if low <= 0 or math.log10(high / low) > 1.5:
                axis.set_minor_formatter(NullFormatter())
                continue
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.5, *range(2, 10))))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _spread(name: str, count: int) -> list[Colour]:
    """So many colours from a colour map, its ends left out."""
    return [tuple(colour[:3]) for colour in matplotlib.colormaps[name](np.linspace(0.05, 0.92, count))]


def fit_titles(figure: Figure) -> None:
    """Titles no wider than their panel's share of the figure: lines that are too long are broken at a comma."""
    spans = [(axes.title, axes.get_subplotspec()) for axes in figure.axes]
    shares = [(title, len(spec.colspan) / spec.get_gridspec().ncols) for title, spec in spans if spec is not None]
    titles = [(title, 0.95 * share) for title, share in shares]  # labels beside a panel move its middle
    for title, share in [*titles, *((text, 1.0) for text in figure.texts)]:
        while title.get_window_extent().width > share * figure.bbox.width:
            broken = _broken(title.get_text())
            if broken == title.get_text():
                break
            title.set_text(broken)


def _broken(text: str) -> str:
    """A text whose longest line is broken at the comma or semicolon nearest to its middle; the same if it has none."""
    lines = text.split("\n")
    longest = max(range(len(lines)), key=lambda i: len(lines[i]))
    line = lines[longest]
    places = [match.end() for match in re.finditer("[,;] ", line)]
    if places:
        place = min(places, key=lambda i: abs(i - len(line) / 2))
        lines[longest : longest + 1] = [line[: place - 1], line[place:]]
    return "\n".join(lines)


def save(figure: Figure, table: pd.DataFrame, out: Path, dpi: int) -> list[Path]:
    """Writes the CSV ``out`` and beside it .png and .pdf; returns the three paths, PNG first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes:
        if not (axes.has_data() or axes.texts or axes.get_title()):  # of a grid with more places than panels
            axes.remove()
    plain_ticks(figure)
    fit_titles(figure)
    png, pdf, csv = (out.with_suffix(suffix) for suffix in (".png", ".pdf", ".csv"))
    figure.savefig(png, dpi=dpi, metadata={"Software": None})
    figure.set_layout_engine("none")  # the PDF in the PNG's layout, not computed again
    figure.savefig(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
    table.to_csv(csv, index=False)
    return [png, pdf, csv]
