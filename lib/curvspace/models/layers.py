"""What several of the networks share: activations by name, feature counts, image checks."""

from __future__ import annotations

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "linear": nn.Identity,
}


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
