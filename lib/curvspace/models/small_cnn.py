"""The small convolutional networks of paper A.

The paper gives their sizes only ("60k parameter CNN" on CIFAR-10, "400 parameter CNN" on MNIST). The layers below are
our choice with sizes nearby: 62,006 and 358 parameters. For MNIST there is a second one with 222: a result that
depends on which of the two is taken is none of the paper's.
"""

from __future__ import annotations

from torch import nn

from curvspace.models.layers import check_image, feature_count


def cnn_60k(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling: 62,006 parameters for (3, 32, 32) and 10 classes. H at least 16."""
    channels, _, _ = check_image("cnn-60k", input_shape, smallest=16)
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return nn.Sequential(
        *features,
        nn.Linear(feature_count(features, input_shape), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def cnn_400(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two strided 3×3 convolutions with 4 channels, average-pool to 2×2, linear: 358 parameters for (1, 28, 28)
    and 10 classes. H at least 8."""
    channels, size, _ = check_image("cnn-400", input_shape, smallest=8)
    for _ in range(2):
        size = (size + 1) // 2  # a 3×3 convolution with stride 2 and padding 1
    stride = size // 2
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        # Two windows a side, overlapping by a row where the size is odd: the windows of adaptive average-pooling,
        # whose backward pass is not deterministic on a GPU.
        nn.AvgPool2d(kernel_size=size - stride, stride=stride),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def cnn_222(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two 5×5 convolutions with one channel, each with max-pooling and ReLU, then linear: 222 parameters for
    (1, 28, 28) and 10 classes. H at least 16."""
    channels, _, _ = check_image("cnn-222", input_shape, smallest=16)
    features = nn.Sequential(
        nn.Conv2d(channels, 1, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(1, 1, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(*features, nn.Linear(feature_count(features, input_shape), num_classes))
