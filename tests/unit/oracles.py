"""Independent evidence for curvature: plain double backward row by row, central differences, explicit Jacobians.

Written without the package's own pure functions: the model is used in place, one batch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LossLike = str | Callable[[Tensor, Tensor], Tensor]


def mean_loss(outputs: Tensor, targets: Tensor, loss: LossLike) -> Tensor:
    if callable(loss):
        return loss(outputs, targets)
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    return 0.5 * ((outputs - targets) ** 2).sum(1).mean()


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def evaluate(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def total_loss(model: nn.Module, batches: list[Any], loss: LossLike) -> Tensor:
    n = sum(len(y) for _, y in batches)
    return sum(mean_loss(evaluate(model, x), y, loss) * (len(y) / n) for x, y in batches)  # type: ignore[return-value]


def flat_gradient(value: Tensor, parameters: list[Tensor], keep: bool = False) -> Tensor:
    grads = torch.autograd.grad(value, parameters, create_graph=keep, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, parameters, strict=True)]
    )


def dense_hessian(model: nn.Module, batches: list[Any], loss: LossLike) -> Tensor:
    """Row i is the gradient of the i-th entry of the gradient."""
    parameters = trainable(model)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        gradient = flat_gradient(total_loss(model, batches, loss), parameters, keep=True)
    rows = [flat_gradient(g, parameters) if g.requires_grad else torch.zeros_like(gradient) for g in gradient]
    return torch.stack(rows)


def dense_gauss_newton(model: nn.Module, batches: list[Any], loss: LossLike) -> Tensor:
    """Sum over batches of J' H_L J with the Jacobian row by row and the loss's Hessian by double backward."""
    parameters = trainable(model)
    n = sum(len(y) for _, y in batches)
    size = sum(p.numel() for p in parameters)
    total = torch.zeros(size, size, dtype=torch.float64)
    for x, y in batches:
        z = evaluate(model, x)
        jacobian = torch.stack([flat_gradient(entry, parameters) for entry in z.reshape(-1)])
        leaf = z.detach().requires_grad_()
        gradient = flat_gradient(mean_loss(leaf, y, loss), [leaf], keep=True)
        hessian = torch.stack([flat_gradient(g, [leaf]) for g in gradient])
        total += len(y) / n * jacobian.T @ hessian @ jacobian
    return total


@torch.no_grad()
def derivative_along(parameters: list[Tensor], quantity: Callable[[], Tensor], v: Tensor, h: float = 1e-4) -> Tensor:
    """Of a quantity of the parameters, along v: central differences, extrapolated once (error O(h^4))."""
    start = [p.clone() for p in parameters]
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def at(t: float) -> Tensor:
        torch._foreach_add_(parameters, parts, alpha=t)
        found = quantity()
        torch._foreach_copy_(parameters, start)
        return found

    def slope(step: float) -> Tensor:
        return (at(step) - at(-step)) / (2 * step)

    return (4 * slope(h) - slope(2 * h)) / 3


def central_difference(model: nn.Module, batches: list[Any], loss: LossLike, v: Tensor, h: float = 1e-4) -> Tensor:
    """H v by central differences of the gradient."""

    @torch.enable_grad()
    def gradient() -> Tensor:
        return flat_gradient(total_loss(model, batches, loss), trainable(model))

    return derivative_along(trainable(model), gradient, v, h)


def jacobian_product(model: nn.Module, x: Any, v: Tensor, h: float = 1e-4) -> Tensor:
    """J v by central differences of the outputs."""
    return derivative_along(trainable(model), lambda: evaluate(model, x), v, h)
