"""Networks of a few dozen parameters and minibatches for them."""

from __future__ import annotations

import torch
from torch import nn

C, D = 4, 5


def linear_softmax(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(D, C).double()


def small_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def batches(count: int, n: int = 24, seed: int = 3, classes: int = C) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=g, dtype=torch.float64),
            torch.randint(0, classes, (n,), generator=g),
        )
        for _ in range(count)
    ]
