r"""The Hessian and the generalised Gauss-Newton matrix of an objective as symmetric linear operators.

.. math:: H = \sum_b \tfrac{n_b}{N} \nabla^2_\theta L_b, \qquad
          G = \sum_b \tfrac{n_b}{N} J_b^\top\, \nabla_z^2 \ell_b\, J_b .

Only products are ever formed: ``H @ v`` for v (P,), ``H @ V`` for V (P, m).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvspace.arithmetic import in_own_arithmetic
from curvspace.curvature.linearisation import (
    Batch,
    GaussNewtonLinearisation,
    HessianLinearisation,
    Linearisation,
    Point,
    UnsaturatedLinearisation,
)
from curvspace.curvature.memory import default_budget, is_out_of_memory, let_go, with_kept_bytes
from curvspace.curvature.split import within_memory
from curvspace.functional import unflatten
from curvspace.losses import Loss
from curvspace.tensors import ordinary
from curvspace.threads import one_at_a_time

Engine = Literal["auto", "linearize", "recompute"]


class CurvatureOperator:
    """A symmetric (P, P) matrix known by its products, summed over batches and, in a process group, over ranks.

    Parameters
    ----------
    point
        The function, the loss and the parameters where curvature is taken.
    batches
        Weighted batches; each is multiplied on its own.
    engine
        ``"linearize"`` keeps each batch's graph, ``"recompute"`` rebuilds it for each ``@``, ``"auto"`` keeps as
        many as fit in ``memory_budget`` bytes (default: a share of the free memory), and none where their size cannot
        be told (a model that uses ``torch.func``).
    group
        A ``torch.distributed`` process group: each rank holds its own batches, products are summed.

    Attributes
    ----------
    shape : (P, P)
    dtype, device : of the products
    rounding : relative rounding of the type, eps; no product is known better than this times its largest terms
    products : how many matrix-vector products have been formed so far
    """

    name = "curvature"
    linearisation: Callable[[Point, Batch], Linearisation]
    deterministic = True  # the objective has checked the model

    def __init__(
        self,
        point: Point,
        batches: Sequence[Batch],
        engine: Engine = "auto",
        memory_budget: int | None = None,
        group: Any = None,
    ):
        if engine not in ("auto", "linearize", "recompute"):
            raise ValueError(f'engine must be "auto", "linearize" or "recompute", got {engine!r}')
        self.point = point
        self.batches: list[Batch] = []
        self.source: Callable[[], tuple[Loss, Sequence[Batch]]] | None = None  # the present ones, for a refresh
        self._take(batches)
        self.engine = engine
        self.group = group
        self.dtype = point.function.dtype
        self.device = point.function.device
        self.rounding = torch.finfo(self.dtype).eps
        self.products = 0
        size = sum(p.numel() for p in point.parameters)
        self.shape = (size, size)
        self.vectors_at_once = 8 if self.device.type == "cuda" else 1
        self._budget = default_budget(self.device) if memory_budget is None else memory_budget
        self._bytes_per_example: float | None = None
        self._kept: dict[int, Linearisation] = {}

    @one_at_a_time
    @torch.inference_mode(False)
    @in_own_arithmetic
    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(f"{self.name} of shape {self.shape} cannot multiply a tensor of shape {tuple(v.shape)}")
        self._require_unchanged()
        rows = ordinary(v.detach().to(self.device, self.dtype).reshape(self.shape[1], -1).T.contiguous())
        given = self.batches
        result, self.batches = within_memory(
            lambda batches: self._multiply(rows, batches), given, lambda: self.point, self._release
        )
        if self.batches is not given:
            self._versions = [b.versions for b in self.batches]
        if self.group is not None:
            torch.distributed.all_reduce(result, group=self.group)
        self.products += len(rows)
        return result[0] if v.ndim == 1 else result.T

    def cancelling_terms(self) -> CurvatureOperator:
        """An operator as large as the terms whose sum a product is: with the loss's Hessian at outputs 0."""
        terms = CurvatureOperator(self.point, self.batches, "recompute", self._budget, self.group)
        terms.linearisation = UnsaturatedLinearisation
        return terms

    @one_at_a_time
    def refresh(self) -> None:
        """Take the model's present parameters in place of those at the last refresh, or at the construction."""
        loss = self.point.loss
        if self.source is not None:
            loss, given = self.source()
            if [(b.index, b.size, b.weight) for b in given] != self._sizes:
                self._take(given)
        self.point = Point.here(self.point.function, loss)
        self._kept = {}
        if sum(p.numel() for p in self.point.parameters) != self.shape[0]:
            raise RuntimeError(f"the model has other than {self.shape[0]} parameters now: make a new {self.name}")

    def _take(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self._versions = [b.versions for b in self.batches]
        self._sizes = [(b.index, b.size, b.weight) for b in self.batches]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: graphs are made anew, and what is counted is counted apart."""
        self._require_unchanged()
        state = {k: copy.copy(v) if isinstance(v, list) else v for k, v in self.__dict__.items() if k != "_versions"}
        return {**state, "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = [b.versions for b in self.batches]

    def _require_unchanged(self) -> None:
        for batch, versions in zip(self.batches, self._versions, strict=True):
            if batch.versions != versions:
                raise RuntimeError(
                    f"batch {batch.index} has been modified by an inplace operation since this {self.name} was made: "
                    "make a new one, or give it a copy"
                )

    def _multiply(self, rows: Tensor, batches: list[Batch]) -> Tensor:
        result = torch.zeros_like(rows)
        for i, batch in enumerate(batches):
            self._add_products(self._linearised(i, batch), rows, result)
        return result

    def _add_products(self, linearisation: Linearisation, rows: Tensor, into: Tensor) -> None:
        """As many vectors together as can be: not all may fit, and some derivatives cannot be batched at all."""
        if len(rows) > self.vectors_at_once:
            for part, total in zip(rows.split(self.vectors_at_once), into.split(self.vectors_at_once), strict=True):
                self._add_products(linearisation, part, total)
        elif len(rows) == 1:
            product = linearisation.product(unflatten(rows[0], self.point.parameters))
            torch._foreach_add_(list(unflatten(into[0], self.point.parameters)), list(product))
        else:
            try:
                stacked = linearisation.products(self._stacked(rows))
                torch._foreach_add_(self._stacked(into), list(stacked))
                return
            except RuntimeError as error:
                self.vectors_at_once = len(rows) // 2 if is_out_of_memory(error) else 1
                let_go(error)
            self._add_products(linearisation, rows, into)

    def _stacked(self, rows: Tensor) -> list[Tensor]:
        """Views of m vectors (m, P) in the parameters' shapes, m in front."""
        parameters = self.point.parameters
        parts = rows.split([p.numel() for p in parameters], dim=1)
        return [part.unflatten(1, p.shape) if p.ndim else part[:, 0] for part, p in zip(parts, parameters, strict=True)]

    def _linearised(self, i: int, batch: Batch) -> Linearisation:
        if i in self._kept:
            return self._kept[i]
        if self.engine == "auto" and self._bytes_per_example is None:
            linearisation, kept = with_kept_bytes(lambda: self.linearisation(self.point, batch))
            total = math.inf if kept is None else kept.total(excluding=self.point.parameters)
            self._bytes_per_example = total / batch.size
        else:
            linearisation = self.linearisation(self.point, batch)
        if self.engine == "linearize" or (self.engine == "auto" and self._fits(batch)):
            self._kept[i] = linearisation
        return linearisation

    def _fits(self, batch: Batch) -> bool:
        assert self._bytes_per_example is not None
        held = sum(self.batches[i].size for i in self._kept)
        return (held + batch.size) * self._bytes_per_example <= self._budget

    def _release(self) -> None:
        self._kept = {}
        self.engine = "recompute"

    def to_scipy(self) -> Any:
        """This operator as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(x: Any) -> Any:
            return (self @ torch.as_tensor(x, device="cpu")).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, dtype=dtype)


class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L`."""

    name = "Hessian"
    linearisation = HessianLinearisation


class GaussNewtonOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = J^\top (\nabla_z^2 \ell) J`, semidefinite for a convex loss."""

    name = "Gauss-Newton matrix"
    linearisation = GaussNewtonLinearisation
    _tried = False

    def _linearised(self, i: int, batch: Batch) -> Linearisation:
        found = super()._linearised(i, batch)
        assert isinstance(found, GaussNewtonLinearisation)
        if not self._tried:
            self._tried = True
            if found.curvature.vanishes():
                warnings.warn(zero_gauss_newton(self.point.loss.name), RuntimeWarning, stacklevel=2)
        return found


def zero_gauss_newton(loss: str) -> str:
    """What to say of the Gauss-Newton matrix of a loss that is linear in the outputs."""
    return (
        f"{loss} is linear in the outputs: its Gauss-Newton matrix is 0 by definition; "
        'for the usual one leave the log-softmax out of the model and take "cross_entropy"'
    )
