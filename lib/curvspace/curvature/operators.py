r"""The Hessian and the generalised Gauss-Newton matrix of an objective as symmetric linear operators.

.. math:: H = \sum_b \tfrac{n_b}{N} \nabla^2_\theta L_b, \qquad
          G = \sum_b \tfrac{n_b}{N} J_b^\top\, \nabla_z^2 \ell_b\, J_b .

Only products are ever formed: ``H @ v`` for v (P,), ``H @ V`` for V (P, m).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvspace.curvature.linearisation import Batch, Point, Product, linearise_gauss_newton, linearise_hessian
from curvspace.functional import flatten, unflatten

Engine = Literal["auto", "linearize", "recompute"]


class CurvatureOperator:
    """A symmetric (P, P) matrix known by its products, summed over batches (and over ranks).

    Attributes
    ----------
    shape : (P, P)
    products : how many matrix-vector products have been formed so far
    """

    name = "curvature"

    def __init__(self, point: Point, batches: Sequence[Batch], engine: Engine = "auto", memory_budget: int | None = None, group: Any = None):
        if engine not in ("auto", "linearize", "recompute"):
            raise ValueError(f'engine must be "auto", "linearize" or "recompute", got {engine!r}')
        self.point = point
        self.batches = list(batches)
        self.engine = engine
        self.group = group
        self.products = 0
        size = sum(p.numel() for p in point.parameters)
        self.shape = (size, size)
        self.dtype = point.function.dtype
        self.device = point.function.device
        self._kept: dict[int, Product] = {}

    def _linearise(self, batch: Batch) -> Product:
        raise NotImplementedError

    def _product(self, i: int) -> Product:
        if i in self._kept:
            return self._kept[i]
        product = self._linearise(self.batches[i])
        if self.engine != "recompute":
            self._kept[i] = product
        return product

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(f"{self.name} of shape {self.shape} cannot multiply a tensor of shape {tuple(v.shape)}")
        v = v.detach().to(self.device, self.dtype)
        columns = [v] if v.ndim == 1 else list(v.T)
        tangents = [unflatten(c.contiguous(), self.point.parameters) for c in columns]
        result = torch.zeros(len(columns), self.shape[0], dtype=self.dtype, device=self.device)
        for i in range(len(self.batches)):
            product = self._product(i)
            for row, tangent in zip(result, tangents, strict=True):
                row += flatten(product(tangent))
        if self.group is not None:
            torch.distributed.all_reduce(result, group=self.group)
        self.products += len(columns)
        return result[0] if v.ndim == 1 else result.T

    def to_scipy(self) -> Any:
        """This operator as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(x: Any) -> Any:
            return (self @ torch.as_tensor(x)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, dtype=dtype)


class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L`."""

    name = "Hessian"

    def _linearise(self, batch: Batch) -> Product:
        return linearise_hessian(self.point, batch)


class GaussNewtonOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = J^\top (\nabla_z^2 \ell) J`, positive semidefinite for convex losses."""

    name = "Gauss-Newton matrix"

    def _linearise(self, batch: Batch) -> Product:
        return linearise_gauss_newton(self.point, batch)
