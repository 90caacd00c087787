"""Networks with one layer of every kind that torch has, in float64, and a batch of 7 examples of 3 classes for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from tests.unit.small_networks import Fn


def _vector(layer: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6), nn.Flatten(), nn.LazyLinear(3))


def _image(layer: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), layer(4), nn.Flatten(), nn.LazyLinear(3))


def _sequence(layer: Callable[[int], nn.Module]) -> nn.Module:
    first = Fn(lambda s, x: (x[0] if isinstance(x, tuple) else x).mean(1))
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6), first, nn.LazyLinear(3))


def _f(f: Callable[[Tensor], Tensor]) -> Callable[[int], nn.Module]:
    return lambda _: Fn(lambda s, x: f(x))


ACTIVATIONS = [
    "ReLU",
    "ReLU6",
    "ELU",
    "SELU",
    "CELU",
    "GELU",
    "SiLU",
    "Mish",
    "Softplus",
    "Softsign",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Sigmoid",
    "Tanhshrink",
    "Softshrink",
    "Hardshrink",
    "PReLU",
    "GLU",
    "RReLU",
]
VECTOR: dict[str, Callable[[int], nn.Module]] = {
    **{name: (lambda h, name=name: getattr(nn, name)()) for name in ACTIVATIONS},
    "softmax": lambda h: nn.Softmax(1),
    "log-softmax": lambda h: nn.LogSoftmax(1),
    "layer norm": nn.LayerNorm,
    "RMS norm": nn.RMSNorm,
    "batch norm": nn.BatchNorm1d,
    "weight norm": lambda h: parametrizations.weight_norm(nn.Linear(h, h)),
    "weight norm, dim 1": lambda h: parametrizations.weight_norm(nn.Linear(h, h), dim=1),
    "weight norm, dim None": lambda h: parametrizations.weight_norm(nn.Linear(h, h), dim=None),
    "older weight norm": lambda h: weight_norm(nn.Linear(h, h)),
    "older weight norm, dim 1": lambda h: weight_norm(nn.Linear(h, h), dim=1),
    "older weight norm, dim None": lambda h: weight_norm(nn.Linear(h, h), dim=None),
    "spectral norm": lambda h: parametrizations.spectral_norm(nn.Linear(h, h)),
    "orthogonal": lambda h: parametrizations.orthogonal(nn.Linear(h, h)),
    "normalize": _f(lambda x: F.normalize(x, dim=1)),
    "products": _f(lambda x: x.cumprod(1)),
    "sort and top": _f(lambda x: torch.cat([x.logsumexp(1, True), x.sort(1)[0], x.topk(2)[0]], 1)),
    "moments and norms": _f(lambda x: torch.stack([x.var(1), x.std(1), x.norm(dim=1), x.norm(p=3, dim=1)], 1)),
    "singular values": _f(lambda x: torch.linalg.svdvals(x.view(-1, 2, 3))),
    "inverse": _f(lambda x: torch.linalg.inv(2 * torch.eye(2).double() + x[:, :4].view(-1, 2, 2)).flatten(1)),
    "matrix exponential": _f(lambda x: torch.matrix_exp(x[:, :4].view(-1, 2, 2)).flatten(1)),
    "Fourier": _f(lambda x: torch.fft.rfft(x).abs()),
    "powers": _f(lambda x: torch.atan2(x, 1 + x.exp()) + (1 + x.square()).pow(x)),
}
IMAGE: dict[str, Callable[[int], nn.Module]] = {
    "group norm": lambda c: nn.GroupNorm(2, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "local response norm": lambda c: nn.LocalResponseNorm(2),
    "batch norm 2d": nn.BatchNorm2d,
    "max pooling": lambda c: nn.MaxPool2d(2),
    "average pooling": lambda c: nn.AvgPool2d(2),
    "adaptive pooling": lambda c: nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.AdaptiveAvgPool2d(2)),
    "power pooling": lambda c: nn.LPPool2d(2, 2),
    "bilinear": lambda c: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda c: nn.Upsample(scale_factor=2, mode="bicubic"),
    "pixel shuffle": lambda c: nn.PixelShuffle(2),
    "unfold": lambda c: nn.Unfold(3),
    "reflection": lambda c: nn.ReflectionPad2d(1),
    "circular convolution": lambda c: nn.Conv2d(c, 3, 3, padding=1, padding_mode="circular"),
    "transposed convolution": lambda c: nn.ConvTranspose2d(c, 4, 3, stride=2, groups=2, dilation=2),
    "depthwise convolution": lambda c: nn.Conv2d(c, c, 3, groups=c),
    "convolution, same": lambda c: nn.Conv2d(c, c, 3, padding="same"),
    "weight-normed convolution": lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 3)),
    "weight-normed convolution, dim 1": lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 3), dim=1),
    "weight-normed transposed": lambda c: parametrizations.weight_norm(nn.ConvTranspose2d(c, c, 3), dim=1),
    "einsum": _f(lambda x: torch.einsum("nchw,ndhw->ncd", x, x)),
}
SEQUENCE: dict[str, Callable[[int], nn.Module]] = {
    "LSTM": lambda h: nn.LSTM(h, 4, batch_first=True),
    "two-way LSTM": lambda h: nn.LSTM(h, 3, 2, bidirectional=True, batch_first=True),
    "GRU": lambda h: nn.GRU(h, 4, batch_first=True),
    "RNN": lambda h: nn.RNN(h, 4, nonlinearity="relu", batch_first=True),
    "attention": lambda h: Fn(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(h, 2, batch_first=True)),
    "transformer layer": lambda h: nn.TransformerEncoderLayer(h, 2, 8, batch_first=True, dropout=0.0),
    "convolution 1d": lambda h: Fn(lambda s, x: s.c(x.mT).mT, c=nn.Conv1d(h, 4, 2)),
}


def _reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(7, *shape, dtype=torch.float64)


def _ids() -> Tensor:
    return torch.randint(7, (7, 5))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{name: (lambda layer=layer: _vector(layer), _reals(4)) for name, layer in VECTOR.items()},
    **{name: (lambda layer=layer: _image(layer), _reals(2, 6, 6)) for name, layer in IMAGE.items()},
    **{name: (lambda layer=layer: _sequence(layer), _reals(5, 4)) for name, layer in SEQUENCE.items()},
    "in place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(inplace=True), nn.Linear(6, 3)), _reals(4)),
    "bilinear form": (
        lambda: Fn(lambda s, x: s.b(torch.tanh(s.a(x)), x), a=nn.Linear(4, 5), b=nn.Bilinear(5, 4, 3)),
        _reals(4),
    ),
    "distances": (
        lambda: Fn(lambda s, x: -torch.cdist(s.a(x), s.w), a=nn.Linear(4, 5), w=nn.Parameter(torch.randn(3, 5))),
        _reals(4),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), _ids),
}
WITHOUT_SECOND_DERIVATIVE = {
    "Hardsigmoid": (lambda: _vector(lambda h: nn.Hardsigmoid()), _reals(4)),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)), _ids),
}


def problem(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make().double(), inputs()
    model(x)  # lazy layers take their size
    return model.eval(), x, torch.randint(3, (7,))
