"""Paper D's LeNet: two convolutional and two fully connected layers with ReLU, "approximately 3.3×10⁶" parameters.

The paper gives no filter sizes. The widely used form below has 3,274,634 parameters on MNIST, which agrees.
"""

from __future__ import annotations

from torch import nn

from curvspace.models.layers import check_image, feature_count


def lenet(
    input_shape: tuple[int, ...], num_classes: int, channels: tuple[int, int] = (32, 64), dense: int = 1024
) -> nn.Module:
    """Conv 5×5 32, pool, conv 5×5 64, pool, dense 1024, linear; padding keeps the size. H at least 4.

    ``channels`` and ``dense`` are the widths, to be reduced on small machines.
    """
    inputs, _, _ = check_image("lenet", input_shape, smallest=4)
    first, second = channels
    features = nn.Sequential(
        nn.Conv2d(inputs, first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return nn.Sequential(
        *features,
        nn.Linear(feature_count(features, input_shape), dense),
        nn.ReLU(),
        nn.Linear(dense, num_classes),
    )
