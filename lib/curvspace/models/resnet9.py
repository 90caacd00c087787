"""ResNet9 of paper A (there: "6.5M parameters").

The paper names the network and its size but not its layers. Taken here is the "DAVIDNET" form of fast CIFAR-10
training, whose size agrees: 6,573,130 parameters at width 64 for 3 channels and 10 classes. That form multiplies its
outputs by 1/8 and has a bias in the last layer; another form of that time has 1/16 and no bias (6,573,120 parameters).
Which the paper took is open: options ``logit_scale`` and ``head_bias``.
"""

from __future__ import annotations

from torch import Tensor, nn

from curvspace.models.layers import check_image


def resnet9(
    input_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    batch_norm: bool = True,
    logit_scale: float = 1.0,
    head_bias: bool = True,
) -> nn.Module:
    """Prep conv w; conv 2w + pool + residual; conv 4w + pool; conv 8w + pool + residual; global max-pool; linear.

    Parameters
    ----------
    input_shape
        (C, H, H), H at least 8.
    width
        w, channels of the first convolution: 64 in the paper, less for small machines.
    batch_norm
        BatchNorm after every convolution (then without bias); if False the convolutions have biases.
    logit_scale
        A constant factor on the outputs: 1/8 in the original "DAVIDNET".
    head_bias
        Whether the last layer has a bias.
    """
    channels, size, _ = check_image("resnet9", input_shape, smallest=8)
    w = width
    return nn.Sequential(
        _conv(channels, w, batch_norm),
        nn.Sequential(_conv(w, 2 * w, batch_norm), nn.MaxPool2d(2), Residual(2 * w, batch_norm)),
        nn.Sequential(_conv(2 * w, 4 * w, batch_norm), nn.MaxPool2d(2)),
        nn.Sequential(_conv(4 * w, 8 * w, batch_norm), nn.MaxPool2d(2), Residual(8 * w, batch_norm)),
        nn.MaxPool2d(size // 8),
        nn.Flatten(),
        nn.Linear(8 * w, num_classes, bias=head_bias),
        *([Scaled(logit_scale)] if logit_scale != 1.0 else []),
    )


class Scaled(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Residual(nn.Module):
    """x + conv(conv(x)), both with the same number of channels."""

    def __init__(self, channels: int, batch_norm: bool):
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels, batch_norm), _conv(channels, channels, batch_norm))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU())
