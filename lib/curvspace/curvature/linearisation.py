r"""Products with the curvature of one batch, whose forward and backward passes are done once and kept.

With :math:`L(\theta) = w\,\ell(z(\theta), y)` for one batch of weight w,

.. math:: H v = \nabla_\theta (\nabla_\theta L^\top v), \qquad G v = w\,J^\top \nabla_z^2\ell\; J v, \quad J = \partial z/\partial\theta.

The graph of the first gradient stays in memory, so a product costs one pass through it instead of starting anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvspace.curvature.frozen import FrozenModel
from curvspace.functional import Inputs
from curvspace.losses import Loss

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples that are evaluated together, and their weight in the objective (their share of all examples)."""

    inputs: Inputs
    targets: Tensor
    weight: float
    index: int


@dataclass(frozen=True)
class Point:
    """Where curvature is taken: the function, the loss, and a copy of the parameters and constants."""

    function: FrozenModel
    loss: Loss
    parameters: tuple[Tensor, ...]
    constants: Mapping[str, Tensor]

    def outputs(self, batch: Batch, parameters: Tensors | None = None) -> Tensor:
        inputs = self.function.cast(batch.inputs)
        return self.function(self.parameters if parameters is None else parameters, self.constants, inputs, batch.index)

    def targets(self, batch: Batch) -> Tensor:
        return self.function.cast(batch.targets)


Product = Callable[[Tensors], Tensors]


def linearise_hessian(point: Point, batch: Batch) -> Product:
    """v -> H v of one batch, by backward through the kept graph of its gradient."""
    theta = point.parameters
    with torch.enable_grad():
        loss = batch.weight * point.loss(point.outputs(batch), point.targets(batch))
        gradient = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
    live = [i for i, g in enumerate(gradient) if g.requires_grad]  # a gradient may be constant in theta

    def product(v: Tensors) -> Tensors:
        if not live:
            return [torch.zeros_like(p) for p in theta]
        return torch.autograd.grad(
            [gradient[i] for i in live], theta, [v[i] for i in live], retain_graph=True, materialize_grads=True
        )

    return product


def linearise_gauss_newton(point: Point, batch: Batch) -> Product:
    """v -> G v of one batch. J v is the derivative of the (linear) map u -> Jᵀu, whose graph is kept."""
    theta = point.parameters
    with torch.enable_grad():
        z = point.outputs(batch)
        u = torch.zeros_like(z, requires_grad=True)
        vjp = torch.autograd.grad(z, theta, u, create_graph=True, materialize_grads=True)
    live = [i for i, w in enumerate(vjp) if w.requires_grad]
    targets = point.targets(batch)

    def product(v: Tensors) -> Tensors:
        (jv,) = torch.autograd.grad([vjp[i] for i in live], u, [v[i] for i in live], retain_graph=True)
        hjv = batch.weight * point.loss.hessian_product(z.detach(), targets, jv)
        return torch.autograd.grad(z, theta, hjv, retain_graph=True, materialize_grads=True)

    return product
