"""What a data set will hold, told from its entry in the config alone; nothing is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curvspace.datasets.catalogue import KNOWN
from curvspace.datasets.generated import gaussian_mixture, sine

DIGITS = (1442, 355, (1, 8, 8), 10)
"""Training and test examples, shape and classes of the set embedded in scikit-learn."""


@dataclass(frozen=True)
class Facts:
    """train and test: examples (at most, where classes are thinned out). numbers: whether targets are numbers."""

    train: int
    test: int
    shape: tuple[int, ...]
    classes: int
    numbers: bool = False

    @property
    def images(self) -> bool:
        return len(self.shape) == 3


def source(block: Mapping[str, Any]) -> Facts | None:
    """The whole set behind an entry; None where that is known to its source alone."""
    name = block["source"]
    if name in KNOWN:
        known = KNOWN[name]
        return Facts(known.train, known.test, known.input_shape, known.num_classes)
    if name == "digits":
        return Facts(*DIGITS)
    if name == "gaussian-mixture":
        has = _options(gaussian_mixture, block)
        count = has["classes"] * has["per_class"]
        return Facts(count, count, (has["dim"],), has["classes"])
    if name == "sine":
        has = _options(sine, block)
        return Facts(has["examples"], has["test_examples"], (1,), 1, numbers=True)
    return None


def variant(block: Mapping[str, Any]) -> Facts | None:
    """The variant that an entry describes."""
    whole = source(block)
    if whole is None:
        return None
    held_out = block.get("validation", "test")
    rest = whole.train - (0 if held_out == "test" else held_out)
    side = block.get("resize")
    return replace(
        whole,
        train=block.get("train") or rest,
        test=block.get("test") or whole.test,
        shape=(whole.shape[0], side, side) if side else whole.shape,
        classes=2 if block.get("labels") == "even-odd" else whole.classes,
    )


def problems(key: str, block: Mapping[str, Any]) -> Iterator[str]:
    """One line for each option that does not fit what the source holds."""
    if block["source"] == "imagefolder" and not Path(block["folder"]).is_dir():
        yield f"{key}.folder = {block['folder']!r} is no folder"
    whole = source(block)
    if whole is None:
        return
    held_out = block.get("validation", "test")
    rest = whole.train - (0 if held_out == "test" else held_out)
    if rest < 1:
        yield f"{key}.validation = {held_out} leaves nothing to train on; allowed: less than {whole.train}"
    elif (block.get("train") or 0) > rest:
        left = "" if held_out == "test" else f", which validation = {held_out} leaves of {whole.train}"
        yield f"{key}.train = {block['train']} is not allowed; allowed: at most {rest}{left}"
    if (block.get("test") or 0) > whole.test:
        yield f"{key}.test = {block['test']} is not allowed; allowed: at most {whole.test}"
    if block.get("resize") and not whole.images:
        yield f"{key}.resize = {block['resize']} needs images; {block['source']} has none"
    if block.get("normalisation", "standard") != "standard" and not whole.images:
        yield f"{key}.normalisation = {block['normalisation']!r} needs images; {block['source']} has none"
    if whole.numbers and block.get("labels") == "even-odd":
        yield f"{key}.labels = 'even-odd' needs classes; the targets of {block['source']} are numbers"
    if whole.numbers and block.get("imbalance", 1) > 1:
        yield f"{key}.imbalance = {block['imbalance']} needs classes; the targets of {block['source']} are numbers"
    if block.get("orthonormal") and whole.classes > whole.shape[0]:
        yield f"{key}.classes = {whole.classes} is not allowed; allowed: at most dim = {whole.shape[0]} if orthonormal"


def _options(function: Any, block: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: block.get(name, parameter.default) for name, parameter in parameters.items()}
