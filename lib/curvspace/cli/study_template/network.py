"""The network. Called with the inputs' shape, the number of classes, and the options of its entry in the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def build(input_shape: Sequence[int], num_classes: int, width: int = 32) -> nn.Module:
    """Two hidden layers of ``width`` units."""
    inputs = math.prod(input_shape)
    hidden = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))
