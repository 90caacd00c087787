r"""The running mean of a network's weights along training.

.. math:: \bar\theta_t = \frac{1-\beta}{1-\beta^t}\sum_{i=1}^{t}\beta^{t-i}\,\theta_i

Over :math:`1/(1-\beta)` steps it averages out what only oscillates: the control for every method that claims to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def accumulate(average: dict[str, Tensor], model: nn.Module, beta: float, step: int) -> None:
    """Take the weights after ``step`` steps (from 1) into the mean, in place.

    Floating-point buffers (the statistics of batch normalisation) are averaged like the weights.
    """
    weight = (1 - beta) / (1 - beta**step)
    present = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    if not average:
        average.update({name: t.clone() for name, t in present.items()})
        return
    torch._foreach_lerp_([average[name] for name in present], list(present.values()), weight)


@contextmanager
def averaged(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model has the mean weights; afterwards its own again, bit for bit."""
    tensors = model.state_dict()
    own = {name: tensors[name].clone() for name in average}
    try:
        with torch.no_grad():
            for name, value in average.items():
                tensors[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                tensors[name].copy_(value)
