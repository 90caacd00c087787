r"""Mean losses of a batch, with the two derivatives in the outputs that curvature products need.

For outputs z (N, C, ...) and targets y, :math:`L(z, y)` is the mean over the N examples. A loss gives

- ``L(z, y)`` itself;
- ``gradient(z, y)``: :math:`\partial L/\partial z`, the shape of z;
- ``hessian_product(z, y, u)``: :math:`(\partial^2 L/\partial z^2) u`, the shape of z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from curvspace.functional import pull_back


class Loss:
    """Any callable(outputs, targets) -> mean loss; its derivatives by autograd on detached outputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._function(outputs, targets)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(z, targets), z)[0]

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(z, targets), z, create_graph=True)
            if not g.requires_grad:  # linear in z
                return torch.zeros_like(u)
            return pull_back([g], [z], [u.detach()], materialize_grads=True)[0]


class CrossEntropy(Loss):
    r"""Softmax cross-entropy, mean over examples (and positions): :math:`H_L u = (p\circ u - p\,(p^\top u))/N`.

    Outputs (N, C) or (N, C, ...); integer targets (N,) or (N, ...). ``label_smoothing`` moves the gradient
    only: the second derivative does not depend on the targets.
    """

    name = "cross_entropy"

    def __init__(self, label_smoothing: float = 0.0):
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(dim=1)
        y = F.one_hot(targets, outputs.shape[1]).movedim(-1, 1).to(p.dtype)
        y = (1 - self.label_smoothing) * y + self.label_smoothing / outputs.shape[1]
        return (p - y) / targets.numel()

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        p = outputs.softmax(dim=1)
        pu = p * u
        return (pu - p * pu.sum(dim=1, keepdim=True)) / targets.numel()


class SquaredError(Loss):
    r"""Half the squared distance, mean over examples.

    .. math:: L = \frac1N\sum_n \tfrac12|z_n - y_n|^2, \qquad H_L = I/N
    """

    name = "mse"

    def __init__(self) -> None:
        pass

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:  # broadcasting (N, 1) against (N,) would be wrong without a word
            raise ValueError(f"mse needs targets of shape {tuple(outputs.shape)}, got {tuple(targets.shape)}")
        return 0.5 * (outputs - targets).square().sum() / outputs.shape[0]

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / outputs.shape[0]

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return u / outputs.shape[0]


def get_loss(loss: str | Loss | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """``"cross_entropy"``, ``"mse"``, a :class:`Loss`, or a callable(outputs, targets) -> mean loss."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        known = {"cross_entropy": CrossEntropy, "mse": SquaredError}
        if loss not in known:
            raise ValueError(f"unknown loss {loss!r}; use one of {sorted(known)} or a callable(outputs, targets)")
        return known[loss]()
    if callable(loss):
        return Loss(loss)
    raise ValueError(f"a loss is a name or a callable(outputs, targets), got {loss!r}")
