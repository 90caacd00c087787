"""Networks with layers that lack a forward-mode rule, or of which torch's fast kernels lack second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.unit.backward_passes import by_hand

C = 3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.inner, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


class Attention(nn.Module):
    """``scaled_dot_product_attention`` called by the model itself, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, n) for n in (4, 4, 4, C))

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), dropout_p=0.2)
        return self.head(attended.mean(1))


class Checkpointed(nn.Module):
    """``reentrant`` None: the same network without a checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.norm(torch.tanh(self.a(x))))
        x = x.clone().requires_grad_(self.reentrant)  # a reentrant checkpoint needs an input with a gradient
        return self.head(self.norm(checkpoint(lambda t: torch.tanh(self.a(t)), x, use_reentrant=self.reentrant)))


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x, self.points))


_square = by_hand(torch.square, lambda g, x: 2 * x * g)


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.head = nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_square(self.drop(self.a(x))))


def _normalised(by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(by(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Tanh(), by(nn.Linear(5, C)))


class Cumulated(nn.Module):
    """Its backward pass has another derivative at a cotangent of zero, though it is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(self.inner(x), 1)


_MANY = {"n_power_iterations": 400}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (Recurrent, (8, 6, 4)),
    "transformer": (Transformer, (8, 6, 4)),
    "attention with dropout": (Attention, (8, 6, 4)),
    "checkpoint": (lambda: Checkpointed(False), (8, 4)),
    "reentrant checkpoint": (lambda: Checkpointed(True), (8, 4)),
    "cdist": (Distances, (8, 4)),
    # Its singular vectors are constants to autograd, which is right once its power iteration has converged.
    "spectral norm": (lambda: _normalised(partial(nn.utils.parametrizations.spectral_norm, **_MANY)), (8, 4)),
    "spectral norm, by hook": (lambda: _normalised(partial(nn.utils.spectral_norm, **_MANY)), (8, 4)),
    "weight norm": (lambda: _normalised(nn.utils.parametrizations.weight_norm), (8, 4)),
    "weight norm, by hook": (lambda: _normalised(nn.utils.weight_norm), (8, 4)),
    "own function": (OwnFunction, (8, 4)),
    "logcumsumexp": (Cumulated, (8, 4)),
}


def problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, a batch of 8 inputs for it, and their classes."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return make().to(dtype), torch.randn(shape).to(dtype), torch.randint(C, (8,))
