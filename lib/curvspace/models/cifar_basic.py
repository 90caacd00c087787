"""Paper C's basic CNN for CIFAR-10 (footnote 4): five layers with 32, 32, 64, 64, 10 output channels.

The footnote gives 5×5 filters and 3×3 max-pooling with stride 2 after each of the first three. It leaves the padding
and the last two filters open: three such poolings take a 32×32 image to 4×4, where a 5×5 filter no longer fits. As in
the network that the authors' framework ships, the fourth layer's filters cover the whole remaining map (4×4), and the
fifth is a 1×1 convolution: that is, two dense layers.
"""

from __future__ import annotations

from torch import nn

from curvspace.models.layers import check_image


def cifar_basic(
    input_shape: tuple[int, ...],
    num_classes: int,
    batch_norm: bool = False,
    channels: tuple[int, int, int, int] = (32, 32, 64, 64),
) -> nn.Module:
    """Three times (conv 5×5, BatchNorm if asked for, ReLU, max-pool), dense 64, linear.

    145,578 parameters on CIFAR-10, 145,962 with BatchNorm (after all four hidden layers; the biases stay). H ≥ 8.
    """
    inputs, size, _ = check_image("cifar-basic", input_shape, smallest=8)
    layers: list[nn.Module] = []
    for outputs in channels[:3]:
        layers.append(nn.Conv2d(inputs, outputs, 5, padding=2))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        inputs, size = outputs, (size + 1) // 2
    layers += [nn.Flatten(), nn.Linear(inputs * size * size, channels[3])]
    if batch_norm:
        layers.append(nn.BatchNorm1d(channels[3]))
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(channels[3], num_classes))
