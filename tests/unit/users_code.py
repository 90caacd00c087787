"""Networks, data and losses as a user of the command has them in a module of his own."""

from __future__ import annotations

import torch
from torch import nn


def build(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def by_shape(input_shape, num_classes):
    return nn.Linear(input_shape[0], num_classes)


def flagged(width: int = 5, bias=True, dropout: float = 0.0, mode="same"):
    return nn.Sequential(nn.Linear(4, width, bias), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, 3))


def arrays():
    x, y = pair()
    return x.numpy(), y.numpy()


def needs_width(width):
    return build(width)


def not_a_model():
    return 3


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 4, generator=generator), torch.randint(3, (30,), generator=generator)


def listed():
    x, y = pair()
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def loader():
    return torch.utils.data.DataLoader(dataset(), batch_size=8)


def dataset():
    return torch.utils.data.TensorDataset(*pair())


def scaled_loss(outputs, targets):
    return 2 * nn.functional.cross_entropy(outputs, targets)


class Bank(nn.Module):
    """Reads a memory: an input that may be as long as the batch without holding its examples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x, bank):
        return self.inner(x + torch.softmax(x @ bank.T, 1) @ bank)


class MaskFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, mask, x):
        return self.inner(x * mask.sum())


class Centred(nn.Module):
    """Each example's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


def too_wide():
    return nn.Linear(7, 3)


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def bank_pair():
    x, y = pair()
    return (x, torch.randn(30, 4, generator=torch.Generator().manual_seed(1))), y


def bank_listed():
    return [bank_pair()]


def bank_mapping():
    (x, bank), y = bank_pair()
    return [{"x": x, "bank": bank, "labels": y}]


def mask_pair():
    x, y = pair()
    return (torch.ones(6, 6) / 36, x), y


def coupled_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) ** 2
