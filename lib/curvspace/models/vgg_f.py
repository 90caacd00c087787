"""VGG-f of paper C, section 4.3: the fast network "CNN-F" of Chatfield et al., 2014, to which the paper refers.

Filters, strides and dense widths are as given there. Local response normalisation, which that network has after its
first two convolutions, is the default here too; ``batch_norm`` puts BatchNorm in its place (after every
convolution), which is what the authors' code trains with.
"""

from __future__ import annotations

from torch import nn

from curvspace.models.layers import check_image, feature_count


def vgg_f(
    input_shape: tuple[int, ...],
    num_classes: int,
    batch_norm: bool = False,
    dropout: float = 0.5,
    dense: int = 4096,
    channels: tuple[int, int] = (64, 256),
) -> nn.Module:
    """Conv 11×11/4 64, conv 5×5 256, three conv 3×3 256, dense 4096, dense 4096, linear; pools after 1, 2 and 5.

    57,147,236 parameters for (3, 224, 224) and 100 classes. H at least 63. ``dense`` and ``channels`` are the widths,
    to be reduced for tests.
    """
    inputs, _, _ = check_image("vgg-f", input_shape, smallest=63)
    first, later = channels
    layers = [
        *_conv(inputs, first, 11, 4, 0, batch_norm, normalise=True),
        _pool(),
        *_conv(first, later, 5, 1, 2, batch_norm, normalise=True),
        _pool(),
        *_conv(later, later, 3, 1, 1, batch_norm),
        *_conv(later, later, 3, 1, 1, batch_norm),
        *_conv(later, later, 3, 1, 1, batch_norm),
        _pool(),
        nn.Flatten(),
    ]
    features = feature_count(nn.Sequential(*layers), input_shape)
    return nn.Sequential(
        *layers,
        *_dense(features, dense, dropout),
        *_dense(dense, dense, dropout),
        nn.Linear(dense, num_classes),
    )


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _dense(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs), nn.ReLU()]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


def _conv(
    inputs: int, outputs: int, size: int, stride: int, padding: int, batch_norm: bool, normalise: bool = False
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    layers.append(nn.ReLU())
    if normalise and not batch_norm:
        layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
    return layers
