r"""Losses of a batch, with the two derivatives in the outputs that curvature products need.

For outputs z and targets y a loss gives

- ``L(z, y)`` itself, a scalar;
- ``gradient(z, y)``: :math:`\partial L/\partial z`, the shape of z;
- ``hessian_product(z, y, u)``: :math:`(\partial^2 L/\partial z^2) u`, the shape of z;
- ``weight(y, n)``: how much the batch, of n examples, counts beside others.

The losses known here by name are weighted means, :math:`L = S/W` with S a sum over the examples and W the sum of
their weights (labels that count, class weights, entries), or such a sum alone (``reduction="sum"``). Parts of a batch
are put together by W, so that the whole has the value that torch gives it; so are those of torch's other losses, by
their reduction. Of any other callable only its value is known: it counts by its number of examples.
"""

from curvspace.losses.base import KnownLoss, Loss, TorchLoss
from curvspace.losses.closed_forms import (
    KNOWN,
    BinaryCrossEntropy,
    CrossEntropy,
    MeanSquaredError,
    NegativeLogLikelihood,
    SquaredError,
)
from curvspace.losses.recognised import get_loss

__all__ = [
    "KNOWN",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "KnownLoss",
    "Loss",
    "MeanSquaredError",
    "NegativeLogLikelihood",
    "SquaredError",
    "TorchLoss",
    "get_loss",
]
