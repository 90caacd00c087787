"""Networks of a few dozen parameters and minibatches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

C, D = 4, 5


class Fn(nn.Module):
    """A function of this module and its inputs; modules and parameters by name."""

    def __init__(self, f: Callable[..., Any], **parts: Any):
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Any, **named: Any) -> Any:
        return self.f(self, *x, **named)


def mlp() -> nn.Sequential:
    """Of 43 parameters in four tensors, from 4 inputs to 3 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def minibatch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and classes for :func:`mlp`."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)


def sorted_minibatch(n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes one after the other, inputs by class: parts differ. A CPU cuts batches of more than 256."""
    g, y = torch.Generator().manual_seed(1), torch.zeros(n, dtype=torch.int64)
    y[-n // 4 :] = 1 + torch.arange(n // 4) % 2
    return torch.randn(n, 4, generator=g).double() + y[:, None], y


def linear_softmax(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(D, C).double()


def small_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def deep_network() -> nn.Module:
    """Three layers in float32, so one hidden matrix."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, C))


def batches(
    count: int, n: int = 24, seed: int = 3, classes: int = C, dtype: torch.dtype = torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype),
            torch.randint(0, classes, (n,), generator=g),
        )
        for _ in range(count)
    ]
