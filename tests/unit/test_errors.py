"""Text where a flag or a number is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional, Union

import pytest

from curvspace.errors import refuse_text


def build(
    width: int = 8,
    rate: float | None = None,
    bias: bool | None = None,
    bare=False,
    either: float | str = 0.1,
    rule: Callable[[int], float] | None = None,
) -> None:
    """A user's function."""


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("width", "7", "a number"),
        ("rate", "0.9", "a number"),
        ("rate", "none", "a number"),
        ("bias", "False", "True or False"),
        ("bare", "off", "True or False"),
    ],
)
def test_text_for_a_flag_or_a_number_is_refused(name: str, text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"kind 'mine': {name} must be {wanted}, got '{text}'"):
        refuse_text("kind 'mine'", build, {name: text})


WRITTEN = [float | None, Optional[float], Union[int, float, None], "Optional[float]", float]  # noqa: UP007, UP045


@pytest.mark.parametrize("annotation", WRITTEN)
def test_a_type_is_known_however_it_is_written(annotation: object) -> None:
    def build(rate: object = None) -> None: ...

    build.__annotations__["rate"] = annotation
    with pytest.raises(ValueError, match="rate must be a number"):
        refuse_text("kind 'mine'", build, {"rate": "0.9"})


@pytest.mark.parametrize("options", [{"either": "0.1"}, {"rule": "0.1"}, {"width": 7, "bias": None}, {"bare": "later"}])
def test_other_values_are_the_functions_own_business(options: dict[str, object]) -> None:
    refuse_text("kind 'mine'", build, options)
