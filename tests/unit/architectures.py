"""Small networks of every kind that the curvature operators promise to handle, with ragged batches to put them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class TiedAutoencoder(nn.Module):
    """One weight matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.again = nn.Linear(5, 3)
        self.again.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))


class Attention(nn.Module):
    """Embeddings, multi-head attention, layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class FusedAttention(nn.Module):
    """The fused attention kernel, called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))


class TwoInputs(nn.Module):
    """Called with a mapping: ``model(image=..., extra=...)``."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(2, 3)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        return F.gelu(self.left(image)) * self.right(extra)


class Segmentation(nn.Module):
    """One label per pixel, through a strided and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.softplus(self.down(x)))


def _frozen_middle() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for p in model[2].parameters():
        p.requires_grad_(False)
    return model


def _reals(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A network, what its inputs look like, the loss, and how normalisation behaves."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    loss: str = "cross_entropy"
    classes: int = 3
    batch_norm: str | None = None
    positions: tuple[int, ...] = ()

    def make(self, seed: int = 0) -> tuple[nn.Module, list[tuple[Any, Tensor]]]:
        torch.manual_seed(seed)
        model = self.build().double()
        return model, [(self.inputs(n), self._targets(n)) for n in (5, 3)]

    def _targets(self, n: int) -> Tensor:
        if self.loss == "mse":
            return torch.randn(n, self.classes, dtype=torch.float64)
        return torch.randint(self.classes, (n, *self.positions))


_IMAGE = _reals(2, 6, 6)
CASES: Mapping[str, Case] = {
    "softmax": Case(lambda: nn.Linear(4, 3), _reals(4)),
    "tanh-mlp": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), _reals(5)),
    "softplus-mlp-mse": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 3)), _reals(5), loss="mse"
    ),
    "relu-convolution-pool": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        _IMAGE,
    ),
    "grouped-dilated-convolution": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(4, 4, 3, dilation=2, groups=2, stride=2, padding=(2, 1)),
            nn.Tanh(),
            nn.Conv2d(4, 2, 3, padding="same", bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        _IMAGE,
    ),
    "convolution-1d": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3)), _reals(2, 4)
    ),
    "segmentation": Case(Segmentation, _reals(1, 4, 4), positions=(4, 4)),
    "batchnorm-batch": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
        ),
        _IMAGE,
        batch_norm="batch",
    ),
    "batchnorm-running": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        _reals(5),
        batch_norm="running",
    ),
    "layernorm": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), _reals(5)),
    "groupnorm-residual": Case(
        lambda: nn.Sequential(
            Residual(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        _IMAGE,
    ),
    "attention": Case(Attention, lambda n: torch.randint(7, (n, 4))),
    "fused-attention": Case(FusedAttention, _reals(3, 4)),
    "tied-weights": Case(TiedAutoencoder, _reals(5)),
    "frozen-parameters": Case(_frozen_middle, _reals(5)),
    "mapping-inputs": Case(
        TwoInputs, lambda n: {"image": torch.randn(n, 4).double(), "extra": torch.randn(n, 2).double()}
    ),
}
"""Every case is float64 and has two ragged batches (5 and 3 examples)."""
