"""Fully connected networks: paper B's FC(100,100) and its relatives, softmax regression, paper C's tanh network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from curvspace.models.layers import activation as make_activation
from curvspace.models.layers import initialise


def fc(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: Sequence[int] = (100, 100),
    activation: str = "relu",
    bias: bool = True,
    initialisation: str = "torch",
) -> nn.Module:
    """Hidden layers of the given widths, each followed by the activation, then a linear layer.

    FC(100,100) on MNIST has 89,610 parameters, FC(32,32) 26,506. ``initialisation``: ``"torch"``, or
    ``"glorot"``, which is Keras' and so that of paper B's authors (:func:`curvspace.models.layers.initialise`).

    Raises
    ------
    ValueError
        If a width is not positive, or the activation or the initialisation unknown.
    """
    if any(width < 1 for width in widths):
        raise ValueError(f"fc: every width must be at least 1, got {list(widths)}")
    sizes = [prod(input_shape), *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), make_activation(activation)]
    return initialise(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes, bias=bias)), initialisation)


def softmax(
    input_shape: tuple[int, ...], num_classes: int, bias: bool = True, initialisation: str = "torch"
) -> nn.Module:
    """Softmax regression: one linear layer (the softmax is in the loss). MNIST: 7,850 parameters, 7,840 without bias.

    ``initialisation``: ``"torch"``, ``"glorot"`` (Keras') or ``"zero"``, which starts at θ = 0.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes, bias=bias))
    return initialise(model, initialisation, allowed=("torch", "glorot", "zero"))


def mlp_tanh(
    input_shape: tuple[int, ...], num_classes: int, widths: Sequence[int] = (128, 64, 32), init_std: float | None = 1.0
) -> nn.Module:
    """Paper C, section 4.4: output sizes 128-64-32-10 with tanh between them (111,146 parameters on MNIST).

    ``init_std`` is the standard deviation of normally distributed weights (biases start at 0). The paper refers to
    K-FAC's public code for it, where it is 1, and the authors' own code agrees; ``None`` gives torch's default.
    """
    model = fc(input_shape, num_classes, widths, activation="tanh")
    if init_std is not None:
        if init_std <= 0:
            raise ValueError(f"mlp-tanh: init_std must be positive, got {init_std}")
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)
    return model
