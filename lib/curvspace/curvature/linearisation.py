r"""Products with the curvature of one batch, whose forward and backward passes are done once and kept.

With :math:`L(\theta) = w\,\ell(z(\theta), y)` for one batch of weight w,

.. math:: H v = \nabla_\theta (\nabla_\theta L^\top v), \qquad
          G v = w\,J^\top \nabla_z^2\ell\; J v, \quad J = \partial z/\partial\theta.

The graph of the first gradient stays in memory, so a product costs one pass through it instead of starting anew.
Everything is plain ``torch.autograd.grad``: ``jacrev`` under another derivative is silently wrong through some
normalisation layers, and tracing a linearisation costs as much as several products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvspace.curvature.convolution import FastConvolutions
from curvspace.curvature.frozen import FrozenModel
from curvspace.functional import Inputs, pull_back
from curvspace.losses import Loss

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples that are evaluated together, and their weight in the objective (their share of all examples)."""

    inputs: Inputs
    targets: Tensor
    weight: float
    index: int
    size: int


@dataclass(frozen=True)
class Point:
    """Where curvature is taken: the function, the loss, and a copy of the parameters and constants."""

    function: FrozenModel
    loss: Loss
    parameters: tuple[Tensor, ...]
    constants: Mapping[str, Tensor]

    @classmethod
    def here(cls, function: FrozenModel, loss: Loss) -> Point:
        """The model's present parameters, as copies that require gradients."""
        return cls(function, loss, function.parameters(), function.constants())

    def outputs(self, batch: Batch) -> Tensor:
        return self.function(self.parameters, self.constants, self.function.cast(batch.inputs), batch.index)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss.

        Raises
        ------
        ValueError
            If outputs and targets do not fit together, naming the batch.
        """
        targets = self.function.cast(batch.targets)
        try:
            return self.loss(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            shapes = f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)} of {targets.dtype}"
            raise ValueError(f"batch {batch.index}: the loss {self.loss.name} failed on {shapes}: {error}") from error

    def finite_loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        value = self.loss_of(outputs, batch)
        if not torch.isfinite(value):
            raise ValueError(f"batch {batch.index}: the loss is {value.item()} at these parameters")
        return value


class Linearisation:
    """Curvature of one batch at one point, ready to multiply."""

    def __init__(self, point: Point, batch: Batch):
        raise NotImplementedError

    def product(self, v: Tensors) -> Tensors:
        """The product with one vector, in the parameters' shapes."""
        raise NotImplementedError

    def products(self, vs: Tensors) -> Tensors:
        """The products with m vectors at once, stacked in front: (m, *shape)."""
        raise NotImplementedError


class HessianLinearisation(Linearisation):
    """H v by backward through the kept graph of the gradient."""

    def __init__(self, point: Point, batch: Batch):
        self.theta = point.parameters
        with torch.enable_grad():
            with FastConvolutions():
                z = point.outputs(batch)
            loss = batch.weight * point.finite_loss_of(z, batch)
            gradient = torch.autograd.grad(loss, self.theta, create_graph=True, materialize_grads=True)
        self.live = [i for i, g in enumerate(gradient) if g.requires_grad]  # others do not change with theta
        self.gradient = [gradient[i] for i in self.live]

    def _multiply(self, vs: Tensors, batched: bool) -> Tensors:
        live = [vs[i] for i in self.live]
        return pull_back(self.gradient, self.theta, live, batched=batched, retain_graph=True, materialize_grads=True)

    def product(self, v: Tensors) -> Tensors:
        return self._multiply(v, False) if self.live else [torch.zeros_like(p) for p in self.theta]

    def products(self, vs: Tensors) -> Tensors:
        return self._multiply(vs, True) if self.live else [torch.zeros_like(v) for v in vs]


class JacobianLinearisation:
    """J v and Jᵀu of outputs z(theta). J v is the derivative of the linear map u -> Jᵀu, whose graph is kept."""

    def __init__(self, theta: Tensors, outputs: Callable[[], Tensor]):
        self.theta = theta
        with torch.enable_grad(), FastConvolutions(linear=True):
            self.z = outputs()
            self.u = torch.zeros_like(self.z, requires_grad=True)
            vjp = pull_back([self.z], self.theta, [self.u], create_graph=True, materialize_grads=True)
        self.live = [i for i, w in enumerate(vjp) if w.requires_grad]
        self.vjp = [vjp[i] for i in self.live]

    def forward(self, v: Tensors, batched: bool = False) -> Tensor:
        """J v for v in the parameters' shapes (``batched``: m of them, stacked in front)."""
        tangents = [v[i] for i in self.live]
        (jv,) = pull_back(self.vjp, [self.u], tangents, batched=batched, retain_graph=True)
        return jv

    def backward(self, u: Tensor, batched: bool = False) -> Tensors:
        """Jᵀu for u of the outputs' shape (``batched``: m of them, stacked in front)."""
        return pull_back([self.z], self.theta, [u], batched=batched, retain_graph=True, materialize_grads=True)


class GaussNewtonLinearisation(Linearisation):
    """G v by J, the loss's Hessian in the outputs, and Jᵀ."""

    def __init__(self, point: Point, batch: Batch):
        self.jacobian = JacobianLinearisation(point.parameters, lambda: point.outputs(batch))
        self.outputs = self.jacobian.z.detach()
        self.targets = point.function.cast(batch.targets)
        self.weight = batch.weight
        self.loss = point.loss
        point.finite_loss_of(self.outputs, batch)

    def _output_product(self, u: Tensor) -> Tensor:
        return self.weight * self.loss.hessian_product(self.outputs, self.targets, u)

    def product(self, v: Tensors) -> Tensors:
        return self.jacobian.backward(self._output_product(self.jacobian.forward(v)))

    def products(self, vs: Tensors) -> Tensors:
        ju = self.jacobian.forward(vs, batched=True)
        return self.jacobian.backward(torch.stack([self._output_product(u) for u in ju]), batched=True)
