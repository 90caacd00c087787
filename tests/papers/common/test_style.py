"""What all figures share: colours that stay apart, ticks that can be read."""

from __future__ import annotations

import colorsys
import itertools

import pytest

from papers.common.style import Style, fit_titles, legend_below, palette_colours, plain_ticks


def test_few_names_have_the_palette_and_many_have_its_hues_again_with_dashes():
    style, base = Style(), palette_colours("colorblind")
    assert list(style.colours("abc").values()) == base[:3]
    looks = style.looks(range(3 * len(base)))
    assert len({(look["colour"], str(look["linestyle"])) for look in looks.values()}) == 3 * len(base)
    hues = {round(colorsys.rgb_to_hls(*look["colour"])[0], 2) for look in looks.values()}
    assert hues == {round(colorsys.rgb_to_hls(*colour)[0], 2) for colour in base}
    for first in range(len(base)):  # one hue: told apart by lightness and by dashes
        own = [looks[first + turn * len(base)] for turn in range(3)]
        light = sorted(colorsys.rgb_to_hls(*look["colour"])[1] for look in own)
        assert min(light[1] - light[0], light[2] - light[1]) > 0.1
        assert len({str(look["linestyle"]) for look in own}) == 3


@pytest.mark.parametrize(("low", "high"), [(2.5, 9.0), (0.9, 2.3), (1.0, 25.0), (0.02, 0.3), (1e-4, 1e3)])
def test_no_tick_of_a_logarithmic_axis_is_a_multiple_of_a_power(low, high):
    style = Style()
    with style.applied():
        figure, axes = style.panels()
        axes[0, 0].plot([0, 1], [low, high])
        axes[0, 0].set_yscale("log")
        plain_ticks(figure)
        figure.draw_without_rendering()
        axis = axes[0, 0].yaxis
        texts = [tick.get_text() for tick in axis.get_ticklabels(which="both") if tick.get_text()]
    assert len(texts) >= 2
    assert not any("times" in text for text in texts)
    if high / low < 20:
        assert all(float(text) > 0 for text in texts)


@pytest.mark.parametrize("panels", [1, 2, 5])
@pytest.mark.parametrize("length", [2, 30, 90])
def test_a_legend_has_as_many_columns_as_the_figure_is_wide(panels, length):
    style = Style()
    with style.applied():
        figure, axes = style.panels(1, panels)
        for i in range(7):
            axes[0, 0].plot([0, 1], [0, i], label=f"{i}".ljust(length, "m"))
        legend_below(figure, ncols=4, fontsize="small")
        figure.draw_without_rendering()
    (legend,) = figure.legends
    fits = legend.get_window_extent().width <= figure.bbox.width
    assert fits or legend._ncols == 1
    assert length > 2 or legend._ncols == 4


def test_ticks_that_a_figure_has_chosen_stay():
    figure, axes = Style().panels()
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks([1, 3], ["one", "three"])
    plain_ticks(figure)
    assert [tick.get_text() for tick in axes[0, 0].get_xticklabels()] == ["one", "three"]


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("size", ["short", "long", "one word"])
def test_titles_stay_within_their_panel(columns, size):
    words = {
        "short": "a, b\nP = 3",
        "long": "a network of some name, a data set with a name; 60,000 examples, one more thing\nP = 3, k = 10",
        "one word": "word" * 40,
    }
    style = Style()
    with style.applied():
        figure, axes = style.panels(1, columns)
        for axis in axes.flat:
            axis.set_title(words[size])
        figure.suptitle(words[size])
        fit_titles(figure)
        figure.draw_without_rendering()
        boxes = [axis.title.get_window_extent() for axis in axes.flat]
    texts = [title.get_text() for title in (*(axis.title for axis in axes.flat), *figure.texts)]
    assert {text.replace("\n", " ") for text in texts} == {words[size].replace("\n", " ")}
    assert [text == words[size] for text in texts[:columns]] == [size != "long"] * columns
    if size != "one word":
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert boxes[-1].x1 <= figure.bbox.width
