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
        error, above that of R unless rounding prevails; at least the part of the step that is lost in rounding
        :math:`\theta \pm hu`
    rounding : the largest of them, at least the type's

    Raises
    ------
    ValueError
        In a product, where more than half of the step is lost in rounding, or where it leads so far that the gradient
        is another one there although the differences are 0.
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
        u, theta = v / length, flatten(p.detach() for p in self.point.parameters)
        lost = self._lost(u, theta)
        near, far = (self._slope(u, theta, h, batches) for h in (self.step, 2 * self.step))
        result = (4 * near - far) / 3
        if not result.any():
            self._require_constant_gradient(u, theta, batches)
        error = float(norm(result - near) / norm(result).clamp_min(torch.finfo(v.dtype).tiny))
        self.errors.append(max(error, lost))
        self.rounding = max(self.rounding, self.errors[-1])
        return length * result

    def _lost(self, u: Tensor, theta: Tensor) -> float:
        """The part of the unit direction that is lost when the parameters move along it by a step."""
        lost = float(norm(((theta + self.step * u) - (theta - self.step * u)) / (2 * self.step) - u))
        if lost > 0.5:
            raise ValueError(
                f"{self.name}: a step of {self.step:.1e} is lost in the rounding of parameters as large as "
                f"{float(theta.abs().max()):.1e} in {theta.dtype}; "
                "give a larger step, or the objective dtype=torch.float64"
            )
        return lost

    def _require_constant_gradient(self, u: Tensor, theta: Tensor, batches: list[Batch]) -> None:
        """Differences of 0 are those of a gradient that stays, not of one that has gone on both sides."""
        here, there = self._gradient(theta, batches), self._gradient(theta + self.step * u, batches)
        if norm(here) > 0 and norm(there - here) > 0.5 * norm(here):
            raise ValueError(
                f"{self.name}: within a step of {self.step:.1e} the gradient becomes another one, from parameters as "
                f"large as {float(theta.abs().max()):.1e}; give a smaller step"
            )

    def _slope(self, u: Tensor, theta: Tensor, h: float, batches: list[Batch]) -> Tensor:
        return (self._gradient(theta + h * u, batches) - self._gradient(theta - h * u, batches)) / (2 * h)

    def _gradient(self, theta: Tensor, batches: list[Batch]) -> Tensor:
        parameters = tuple(p.clone().requires_grad_() for p in unflatten(theta, self.point.parameters))
        return mean_gradient(replace(self.point, parameters=parameters), batches)
