r"""Hessian products by differences of gradients, for models without second derivatives.

With a unit direction u and :math:`D(h) = (\nabla L(\theta + hu) - \nabla L(\theta - hu)) / 2h`,

.. math:: H u = \tfrac13(4 D(h) - D(2h)) + O(h^4).

Four gradients a product. How far the two estimates are apart says how good they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvspace.curvature.linearisation import Batch, Point, mean_gradient
from curvspace.curvature.operators import CurvatureOperator
from curvspace.functional import flatten, unflatten
from curvspace.inner import norm


class DifferenceHessianOperator(CurvatureOperator):
    r"""The Hessian by differences of gradients.

    Parameters
    ----------
    point, batches, memory_budget, group
        As for the other operators; nothing is kept.
    step
        h, the distance in parameter space; default: the fourth root of the type's rounding.

    Attributes
    ----------
    errors : of each product so far, :math:`|R - D(h)| / |R|` with R the result: an estimate of D(h)'s relative
        error, above that of R unless rounding prevails
    rounding : the largest of them, at least the type's
    """

    name = "Hessian by differences"

    def __init__(
        self,
        point: Point,
        batches: Sequence[Batch],
        memory_budget: int | None = None,
        group: Any = None,
        step: float | None = None,
    ):
        super().__init__(point, batches, "recompute", memory_budget, group)
        if step is not None and not step > 0:
            raise ValueError(f"step must be positive, got {step}")
        self.step = torch.finfo(self.dtype).eps ** 0.25 if step is None else step
        self.errors: list[float] = []

    def _multiply(self, rows: Tensor, batches: list[Batch]) -> Tensor:
        return torch.stack([self._product(row, batches) for row in rows])

    def _product(self, v: Tensor, batches: list[Batch]) -> Tensor:
        length = norm(v)
        if length == 0:
            return torch.zeros_like(v)
        near, far = (self._slope(v / length, h, batches) for h in (self.step, 2 * self.step))
        result = (4 * near - far) / 3
        self.errors.append(float(norm(result - near) / norm(result).clamp_min(torch.finfo(v.dtype).tiny)))
        self.rounding = max(self.rounding, self.errors[-1])
        return length * result

    def _slope(self, u: Tensor, h: float, batches: list[Batch]) -> Tensor:
        theta = flatten(p.detach() for p in self.point.parameters)

        def gradient(at: Tensor) -> Tensor:
            parameters = tuple(p.clone().requires_grad_() for p in unflatten(at, self.point.parameters))
            return mean_gradient(replace(self.point, parameters=parameters), batches)

        return (gradient(theta + h * u) - gradient(theta - h * u)) / (2 * h)
