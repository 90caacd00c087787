r"""Eigenpairs along a trajectory of operators, each solve started from the last subspace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from curvspace.curvature.eigensolver import EigenPairs, Which, eigsh
from curvspace.curvature.krylov import SymmetricOperator


class SubspaceTracker:
    """k extreme eigenpairs of a slowly changing operator: ``tracker.update(H)`` starts from the last eigenvectors.

    Attributes
    ----------
    pairs : the last :class:`EigenPairs`, or None before the first update
    products : matrix-vector products spent so far
    """

    def __init__(
        self,
        k: int,
        which: Which = "LA",
        tol: float = 1e-3,
        *,
        max_products: int | None = None,
        max_basis: int | None = None,
        seed: int = 0,
    ):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.which = which
        self.tol = tol
        self.max_products = max_products
        self.max_basis = max_basis
        self.seed = seed
        self.pairs: EigenPairs | None = None
        self.products = 0

    def update(self, operator: SymmetricOperator) -> EigenPairs:
        """The eigenpairs of this operator."""
        v0 = None if self.pairs is None else self.pairs.vectors
        self.pairs = eigsh(
            operator,
            self.k,
            self.which,
            self.tol,
            v0,
            self.max_products,
            self.max_basis,
            self.seed,
        )
        self.products += self.pairs.products
        return self.pairs


def track(
    operators: Iterable[SymmetricOperator], k: int, which: Which = "LA", tol: float = 1e-3, **options: Any
) -> Iterator[EigenPairs]:
    """Eigenpairs of each operator in turn; options as for :class:`SubspaceTracker`."""
    tracker = SubspaceTracker(k, which, tol, **options)
    for operator in operators:
        yield tracker.update(operator)
