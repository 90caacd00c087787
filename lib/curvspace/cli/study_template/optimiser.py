"""The optimiser. Called with the network, the run's learning rate and loss, and the options of its entry."""

from __future__ import annotations

import torch
from torch import nn

from curvspace.optim import SpanFilter


def build(model: nn.Module, num_classes: int, lr: float, loss: str, momentum: float = 0.9) -> SpanFilter:
    """SGD on what is left of the gradient when its part in the span of the class gradients is taken out."""
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return SpanFilter(sgd, model, num_classes=num_classes, loss=loss)
