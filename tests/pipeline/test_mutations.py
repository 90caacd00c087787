"""Whole configs with one value made wrong, drawn over everything that a config holds: each is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from workflow import settings
from workflow.specs import load

ROOT = Path(__file__).parents[2]
COUNT = 120
FREE = ("results", "family", "folder", "scale")
"""Text that may be anything, or that is decided before."""
Place = tuple[Any, ...]

NONSENSE: dict[type, list[Any]] = {
    str: [17, "no-such-thing", "", [], {}],
    bool: ["yes please", 2, []],
    int: ["many", float("nan"), -3, 10**12, {}, [], "128.5", True],
    float: ["much", float("nan"), float("inf"), float("-inf"), -1.0e40, {}, "0x1"],
    list: [3, "many", {}],
    dict: [3, "many", [1, 2]],
}


@cache
def smoke() -> dict[str, Any]:
    return settings.whole(settings.files([ROOT / "config.yaml", ROOT / "workflow" / "presets" / "smoke.yaml"]))


def places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of the config with the keys that lead to it."""
    if place:
        yield place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def key_of(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def mutations() -> Iterator[tuple[Place, str, Callable[[Any, Any], None]]]:
    """All wrong values, wrong by their making: (where, what, how to put it in)."""

    def put(value: Any) -> Callable[[Any, Any], None]:
        return lambda block, key: block.__setitem__(key, value)

    for place, old in places(smoke()):
        skipped_with_a_line = place[:3] == ("studies", "c", "networks") and place[-1] == "dataset"
        if skipped_with_a_line or place[-1] in FREE or place[0] == "style" or old is None:
            continue
        for wrong in NONSENSE[type(old)]:
            yield place, repr(wrong), put(wrong)
        if isinstance(old, dict):
            yield (*place, "unheard-of"), "an unknown key", put(3)
        if isinstance(old, list) and old and place[0] == "studies":
            yield place, "an entry twice", put([*old, old[0]])


def said(config: Mapping[str, Any]) -> list[str]:
    try:
        load(config, ROOT)
    except SystemExit as stop:
        return str(stop.code).splitlines()
    return []


def test_the_config_that_is_mutated_is_right():
    assert said(smoke()) == []


def test_a_wrong_value_anywhere_is_refused_by_name():
    drawn = random.Random(0).sample(list(mutations()), COUNT)
    silent, vague = [], []
    for place, what, change in drawn:
        config = deepcopy(smoke())
        block = config
        for part in place[:-1]:
            block = block[part]
        change(block, place[-1])
        try:
            lines = said(config)
        except Exception as error:  # a traceback at the start
            lines = [f"{type(error).__name__}: {error}"]
        if not lines:
            silent.append((key_of(place), what))
        elif not any(
            line.startswith("config: ") and str(place[-2 if isinstance(place[-1], int) else -1]) in line
            for line in lines
        ):
            vague.append((key_of(place), what, lines[0]))
    assert silent == []
    assert vague == []


def test_options_that_a_factory_hands_on_are_those_of_whom_it_hands_them():
    for option, value in (("unheard-of", 3), ("gain", "much"), ("optimizer", "sgd")):
        config = deepcopy(smoke())
        config["optimizers"]["updates-filtered"][option] = value
        (line,) = said(config)
        assert f"updates-filtered.{option}" in line
    config["optimizers"]["updates-filtered"] = {**smoke()["optimizers"]["updates-filtered"], "gain": 0.5, "beta": 0.9}
    assert said(config) == []
