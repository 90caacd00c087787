r"""The empirical Fisher matrix: the gradients of single examples instead of the loss's second derivatives.

.. math:: F = N \sum_n c_n c_n^\top, \qquad \sum_n c_n = \nabla L,

with :math:`c_n` the share of example n in the gradient. For a plain mean it is
:math:`\tfrac1N\sum_n \nabla\ell_n\nabla\ell_n^\top`. No gradient of one example is ever formed: with r_n the loss's
derivative in the outputs of example n, :math:`c_n = J_n^\top r_n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvspace.curvature.linearisation import Batch, GaussNewtonLinearisation, Point, Tensors
from curvspace.curvature.operators import CurvatureOperator, Engine


class FisherLinearisation(GaussNewtonLinearisation):
    """F v by J, the products of each example with its r_n, and Jᵀ."""

    def __init__(self, point: Point, batch: Batch, examples: int):
        super().__init__(point, batch)
        if self.curvature.read:
            raise ValueError("the empirical Fisher matrix needs a loss that does not read the parameters (a penalty)")
        z = self.jacobian.z.detach()
        if z.ndim == 0 or z.shape[0] != batch.size:
            raise ValueError("the empirical Fisher matrix needs outputs with one row an example, in one tensor")
        self.r = batch.weight * point.loss.gradient(z, point.function.cast(batch.targets))
        self.examples = examples

    def _weighed(self, jv: Tensor) -> Tensor:
        along = (self.r * jv).flatten(1).sum(1)
        return self.examples * self.r * along.view(-1, *[1] * (self.r.ndim - 1))

    def product(self, v: Tensors) -> Tensors:
        return self.jacobian.backward(self._weighed(self.jacobian.forward(v)))

    def products(self, vs: Tensors) -> Tensors:
        jv = self.jacobian.forward(vs, batched=True)
        return self.jacobian.backward(torch.stack([self._weighed(one) for one in jv]), batched=True)


class EmpiricalFisherOperator(CurvatureOperator):
    r"""The empirical Fisher matrix :math:`F = N\sum_n c_n c_n^\top`; semidefinite, of rank N at most."""

    name = "empirical Fisher matrix"

    def __init__(
        self,
        point: Point,
        batches: Sequence[Batch],
        engine: Engine = "auto",
        memory_budget: int | None = None,
        group: Any = None,
        *,
        examples: int,
    ):
        super().__init__(point, batches, engine, memory_budget, group)
        self.linearisation = partial(FisherLinearisation, examples=examples)
