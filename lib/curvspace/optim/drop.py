"""The rule that does nothing, for the span or for the orthogonal complement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvspace.optim.inside import Inside
from curvspace.optim.outside import Outside
from curvspace.optim.span import Span


class Drop(Inside, Outside):
    """No step: within the span as ``inside=Drop()``, outside of it as ``outside=Drop()``.

    Outside the span ``lr`` and ``momentum`` still name the learning rate of a :class:`~curvspace.optim.inside.Scale`
    step and the momentum of the whole step.
    """

    heavy_ball = True

    def __init__(self, lr: float = 1.0, momentum: float = 0.0):
        Outside.__init__(self, lr, momentum)

    def coefficients(self, coordinates: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.zeros_like(coordinates)

    def step(self, gradient: Tensor, group: dict[str, Any], span: Span | None) -> Tensor:
        return torch.zeros_like(gradient)
