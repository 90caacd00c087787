"""Spans of a SpanFilter as dense matrices, and a network with images to filter the gradients of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvspace.functional import flatten
from tests.unit.small_networks import C

KINDS = ("mean-directions", "class-gradients", "past-updates", "random-directions")


def conv_network(norm: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3), *([nn.BatchNorm2d(3)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 9, C)).double()


def images(count: int, n: int = 24) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64) + 0.5, torch.randint(0, C, (n,), generator=g))
        for _ in range(count)
    ]


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **options})


def gradients(model: nn.Module) -> Tensor:
    return flatten(p.grad for p in model.parameters() if p.grad is not None)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def dense_means(model: nn.Module) -> Tensor:
    parameters, columns = list(model.parameters()), []
    for i, p in enumerate(parameters):
        for unit in range(len(p) if p.ndim > 1 else 0):
            marked = [torch.zeros_like(q) for q in parameters]
            marked[i][unit] = 1 / marked[i][unit].numel() ** 0.5
            columns.append(flatten(marked))
    return torch.stack(columns, 1)


def dense_class_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Example by example in eval mode: (P, classes present)."""
    model.eval()
    columns = []
    for k in y.unique().tolist():
        members = [torch.autograd.grad(model(x[i : i + 1])[0, k], list(model.parameters())) for i in (y == k).nonzero()]
        columns.append(torch.stack([flatten(m) for m in members]).mean(0))
    model.train()
    return torch.stack(columns, 1)


def projector(columns: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-10 * s[0]]
    return u @ u.T
