"""ResNet-18 in the form used for CIFAR-10 (papers B and C): 11,173,962 parameters for 3 channels and 10 classes.

The first convolution is 3×3 with stride 1 and there is no max-pooling after it, as images are only 32×32. Neither
paper prints the layers; this form is the customary one for that data set.
"""

from __future__ import annotations

from torch import Tensor, nn

from curvspace.models.layers import check_image


def resnet18(input_shape: tuple[int, ...], num_classes: int, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """Conv w, then four stages of two basic blocks with w, 2w, 4w, 8w channels, average-pool, linear.

    Parameters
    ----------
    input_shape
        (C, H, H), H at least 8.
    width
        w: 64 in the papers.
    dropout
        Rate before each block's second convolution (paper C, table 2, gives numbers with 0.3 but no places).
    """
    channels, _, _ = check_image("resnet18", input_shape, smallest=8)
    stages: list[nn.Module] = []
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        stages.append(BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2, dropout=dropout))
        stages.append(BasicBlock(outputs, outputs, stride=1, dropout=dropout))
        inputs = outputs
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *stages,
        SpatialMean(),
        nn.Linear(inputs, num_classes),
    )


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))): the shortcut is a 1×1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shortcut(x) + self.body(x))


class SpatialMean(nn.Module):
    """Mean over the pixels: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
