"""What several of the networks share: activations by name, feature counts, image checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "linear": nn.Identity,
}

INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "glorot": partial(nn.init.xavier_uniform_, gain=1.0),
    "zero": nn.init.zeros_,
}
"""How kernels are drawn, by name, where that is not torch's default; biases are 0 with each of these."""


def activation(name: str) -> nn.Module:
    """A new activation layer by its name (never in place, so that every derivative can pass through it).

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


def initialise(model: nn.Module, name: str, allowed: tuple[str, ...] = ("torch", "glorot")) -> nn.Module:
    r"""The same network with the parameters of its linear layers and convolutions drawn anew; others stay.

    ``"torch"`` leaves torch's defaults: kernels and biases uniform within :math:`\pm 1/\sqrt{n_{in}}`. ``"glorot"`` is
    Keras' default: kernels uniform within :math:`\pm\sqrt{6/(n_{in}+n_{out})}` (Glorot and Bengio 2010, eq. 16), biases
    0; of a convolution with C maps in, K out and r × r weights each, :math:`n_{in}=r^2C` and :math:`n_{out}=r^2K`.
    ``"zero"``: all 0.

    Raises
    ------
    ValueError
        If the name is none of ``allowed``.
    """
    if name not in allowed:
        raise ValueError(f"initialisation must be one of {', '.join(allowed)}, got {name!r}")
    if name == "torch":
        return model
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            INITIALISATIONS[name](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def check_image(kind: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """The shape as (C, H, W).

    Raises
    ------
    ValueError
        If one example is no square image of at least ``smallest`` × ``smallest`` pixels.
    """
    if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
        raise ValueError(f"{kind} takes square images (C, H, H); one example of this data set has shape {input_shape}")
    if input_shape[1] < smallest:
        raise ValueError(
            f"{kind} needs images of at least {smallest}×{smallest} pixels, got {input_shape[1]}×{input_shape[2]}; "
            f"the data set's option 'resize: {smallest}' enlarges them"
        )
    channels, height, width = input_shape
    return channels, height, width


def feature_count(features: nn.Module, input_shape: tuple[int, ...]) -> int:
    """How many numbers the layers give for one example (their running statistics are left alone)."""
    training = features.training
    features.eval()
    with torch.no_grad():
        count = features(torch.zeros(1, *input_shape)).numel()
    features.train(training)
    return count
