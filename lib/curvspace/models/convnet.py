"""Paper B's ConvNet: the CIFAR-10 example of Keras, to which the paper refers for the layers."""

from __future__ import annotations

from torch import nn

from curvspace.models.layers import check_image, feature_count, initialise


def convnet(
    input_shape: tuple[int, ...],
    num_classes: int,
    dropout: bool = False,
    batch_norm: bool = False,
    extra_dense: int = 0,
    dense: int = 512,
    width: int = 32,
    initialisation: str = "torch",
) -> nn.Module:
    """Two 3×3 conv 32, pool, two 3×3 conv 64, pool, dense 512, linear: 1,250,858 parameters on CIFAR-10. H ≥ 16.

    The first convolution of each pair is padded, the second is not. Paper B's table 1 has one row "with dropout,
    batch-norm, and an extra dense layer" without saying where; here:

    Parameters
    ----------
    dropout
        At the Keras example's places and rates: 0.25 after each pool, 0.5 after the dense layer. The paper's default
        is no regularisation.
    batch_norm
        BatchNorm after every convolution and hidden dense layer, before the ReLU.
    extra_dense
        Width of one more hidden layer after the first dense one; 0 for none.
    dense
        Width of the dense layer: 512 in the example, 256 in the program of paper B's authors.
    width
        Channels of the first two convolutions, half those of the other two: 32 in the example.
    initialisation
        ``"torch"``, or Keras' ``"glorot"`` (:func:`curvspace.models.layers.initialise`).
    """
    channels, _, _ = check_image("convnet", input_shape, smallest=16)
    features: list[nn.Module] = []
    for inputs, outputs in ((channels, width), (width, 2 * width)):
        features += _conv(inputs, outputs, 1, batch_norm) + _conv(outputs, outputs, 0, batch_norm)
        features.append(nn.MaxPool2d(2))
        if dropout:
            features.append(nn.Dropout(0.25))
    features.append(nn.Flatten())
    width = feature_count(nn.Sequential(*features), input_shape)
    head: list[nn.Module] = []
    for hidden in [dense, extra_dense] if extra_dense else [dense]:
        head.append(nn.Linear(width, hidden))
        if batch_norm:
            head.append(nn.BatchNorm1d(hidden))
        head.append(nn.ReLU())
        if dropout:
            head.append(nn.Dropout(0.5))
        width = hidden
    return initialise(nn.Sequential(*features, *head, nn.Linear(width, num_classes)), initialisation)


def _conv(inputs: int, outputs: int, padding: int, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=padding)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return [*layers, nn.ReLU()]
