"""Bases of eigenvectors of the minibatch's curvature, followed through training from warm starts."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from curvspace.curvature.eigensolver import eigsh
from curvspace.optim.base import require, require_count, require_numbers
from curvspace.optim.bases import Basis, Observation
from curvspace.optim.minibatch import CURVATURES, Curvature, Minibatch
from curvspace.optim.span import identity_span, ordered_span


class TopEigenvectors(Basis):
    r"""The k eigenvectors of the largest eigenvalues of H or G of a minibatch (paper B, eq. 11).

    Each refresh starts from the last eigenvectors and spends at most ``max_products`` curvature products: the
    eigenspace need only be followed, not resolved. Its eigenvalues are the basis's estimate of the curvatures.

    Parameters
    ----------
    k
        Number of eigenvectors; paper B takes the number of classes.
    curvature
        ``"hessian"`` or ``"gauss-newton"`` (also ``"ggn"``).
    refresh_every
        Steps between refreshes, if not left to the optimiser's own ``refresh_every``.
    tol
        Residual, relative to the largest eigenvalue, at which a refresh stops.
    max_products
        Budget of a refresh after the first (None: 2 k); the first, a cold start, has twice as much.
    fraction
        Share of the minibatch in the operator.
    """

    which: ClassVar[Literal["LA", "SA"]] = "LA"

    def __init__(
        self,
        k: int,
        curvature: Literal["hessian", "gauss-newton", "ggn"] = "hessian",
        refresh_every: int | None = None,
        tol: float = 0.05,
        max_products: int | None = None,
        fraction: float = 1.0,
    ):
        super().__init__()
        kind = "gauss-newton" if curvature == "ggn" else curvature
        require_count("k", k)
        require(kind in CURVATURES, "curvature", curvature, '"hessian", "gauss-newton" or "ggn"')
        require_count("refresh_every", refresh_every, optional=True)
        require_numbers(tol=tol, fraction=fraction)
        require(tol > 0, "tol", tol, "positive")
        require(max_products is None or max_products >= k, "max_products", max_products, f"at least k = {k}")
        require(0 < fraction <= 1, "fraction", fraction, "in (0, 1]")
        self.k, self.curvature, self.tol, self.fraction = k, kind, tol, fraction
        self.refresh_every = refresh_every
        self.max_products = max_products or 2 * k

    def observe(self, batch: Minibatch, refresh: bool) -> Observation:
        loss, gradient = batch.gradient()
        if not refresh:
            return Observation(loss, gradient)
        self._refresh(batch, gradient)
        return Observation(loss, gradient, self.state.get("values"))

    def _refresh(self, batch: Minibatch, gradient: Tensor) -> None:
        require(self.k <= len(gradient), "k", self.k, f"at most the number of parameters, {len(gradient)}")
        if not torch.isfinite(gradient).all():  # diverged: the loop will say so; there is nothing to follow
            return
        part = batch.part(self.fraction)
        curvature: Curvature = self.curvature  # type: ignore[assignment]
        start: Any = self.state["rows"].T if self.state else gradient
        budget = self.max_products * (1 if self.state else 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unfinished solve is meant here
            pairs = eigsh(part.operator(curvature), self.k, self.which, self.tol, v0=start, max_products=budget)
        part.count_products(pairs.products)
        self.state = {"rows": pairs.vectors.T.contiguous(), "values": pairs.values.to(gradient.dtype)}
        self.restore()

    def restore(self) -> None:
        if self.state:
            self.span = identity_span(self.state["rows"])


class BottomEigenvectors(TopEigenvectors):
    """The k eigenvectors of the most negative eigenvalues of the minibatch's Hessian (paper D)."""

    which = "SA"


class ExtremeEigenvectors(Basis):
    r"""Eigenvectors of the k largest and some of the smallest eigenvalues of H (FOSI, arXiv 2302.08484).

    Each end is followed from its own last eigenvectors, with the budgets and tolerance of
    :class:`TopEigenvectors`; the two are then made orthonormal together. Order of the eigenvalues: the k largest,
    largest first, then the smallest, smallest first.
    """

    def __init__(self, k: int, smallest: int = 0, **options: Any):
        super().__init__()
        require_count("smallest", smallest, 0)
        self.ends = [TopEigenvectors(k, **options), *([BottomEigenvectors(smallest, **options)] if smallest else [])]

    @property  # type: ignore[override]
    def state(self) -> dict[str, Any]:
        return {str(i): end.state for i, end in enumerate(getattr(self, "ends", []))}

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        for i, end in enumerate(getattr(self, "ends", [])):
            end.state = value[str(i)]

    def made_of(self) -> list[Any]:
        return [type(self).__name__, *(end.made_of() for end in self.ends)]

    @property
    def values(self) -> Tensor | None:
        """The eigenvalues (k + smallest,); None before the first refresh."""
        if not self.ends[0].state:
            return None
        return torch.cat([end.state["values"] for end in self.ends])

    def spread(self) -> Tensor:
        r""":math:`|\lambda_1/\lambda_k|` of the k largest."""
        values = self.ends[0].state["values"].abs()
        return values[0] / values[-1]

    def observe(self, batch: Minibatch, refresh: bool) -> Observation:
        loss, gradient = batch.gradient()
        if not refresh:
            return Observation(loss, gradient)
        for end in self.ends:
            end._refresh(batch, gradient)
        self.restore()
        return Observation(loss, gradient, self.values)

    def restore(self) -> None:
        if self.values is None:
            return
        rows = torch.cat([end.state["rows"] for end in self.ends])
        self.span = identity_span(rows) if len(self.ends) == 1 else ordered_span(rows)
