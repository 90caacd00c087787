"""Paper C's basic CNN for CIFAR-10 (footnote 4): five layers with 32, 32, 64, 64, 10 output channels.

The footnote gives 5×5 filters and 3×3 max-pooling with stride 2 after each of the first three. It leaves the padding
and the last two filters open: three such poolings take a 32×32 image to 4×4, where a 5×5 filter no longer fits. As in
the network that the authors' framework ships, the fourth layer's filters cover the whole remaining map (4×4), and the
fifth is a 1×1 convolution: that is, two dense layers. The authors' program differs from the footnote: its
second and third poolings are averages, and its kernels are normal.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from curvspace.models.layers import check_image

POOLINGS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
DEVIATIONS = (0.01, 0.05, 0.05, 0.05, 0.05)
"""Standard deviations of the five layers' kernels in the authors' program."""


def cifar_basic(
    input_shape: tuple[int, ...],
    num_classes: int,
    batch_norm: bool = False,
    channels: tuple[int, int, int, int] = (32, 32, 64, 64),
    poolings: Sequence[str] = ("max", "max", "max"),
    initialisation: str = "torch",
) -> nn.Module:
    """Three times (conv 5×5, BatchNorm if asked for, ReLU, pooling), dense 64, linear.

    145,578 parameters on CIFAR-10, 145,962 with BatchNorm (after all four hidden layers; the biases stay). H ≥ 8.
    ``poolings``: of each of the three, ``"max"`` or ``"average"`` (padding counts as zeros), 3×3 with stride 2.
    ``initialisation``: ``"torch"``, or ``"normal"``, the authors' program's: kernels N(0, 0.01²) in the first layer and
    N(0, 0.05²) in the others, biases 0, for inputs of the order of pixels (``normalisation: whitened``).

    Raises
    ------
    ValueError
        If the image is too small, a pooling or the initialisation unknown, or their number is not three.
    """
    inputs, size, _ = check_image("cifar-basic", input_shape, smallest=8)
    if len(poolings) != 3 or not set(poolings) <= set(POOLINGS):
        raise ValueError(f"cifar-basic: poolings must be three of {', '.join(POOLINGS)}, got {list(poolings)}")
    if initialisation not in ("torch", "normal"):
        raise ValueError(f"cifar-basic: initialisation must be torch or normal, got {initialisation!r}")
    layers: list[nn.Module] = []
    for outputs, pooling in zip(channels[:3], poolings, strict=True):
        layers.append(nn.Conv2d(inputs, outputs, 5, padding=2))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.ReLU(), POOLINGS[pooling](3, stride=2, padding=1)]
        inputs, size = outputs, (size + 1) // 2
    layers += [nn.Flatten(), nn.Linear(inputs * size * size, channels[3])]
    if batch_norm:
        layers.append(nn.BatchNorm1d(channels[3]))
    layers += [nn.ReLU(), nn.Linear(channels[3], num_classes)]
    if initialisation == "normal":
        deviations = iter(DEVIATIONS)
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=next(deviations))
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
