r"""A growing orthonormal basis of a Krylov space, with what is needed of the operator and nothing else.

With V (P, j) orthonormal and :math:`T = V^\top A V` the basis keeps

.. math:: A V = V T + C B, \qquad V^\top C = 0,

C (P, c) the *candidates*: the products' parts outside the span, one for each start vector, and B (c, j) how the
products share them. One step takes a candidate as the next basis vector and puts the orthogonal part of its product
in its place. From one start vector c = 1, T is tridiagonal and this is the Lanczos iteration: the products A V need not
be kept, and the residual of a Ritz pair :math:`(\theta, Vs)`, :math:`A V s - \theta V s = C B s`, costs neither a
product nor a vector. A start subspace of m vectors gives c = m (band Lanczos). Keeping Ritz vectors only, when the
basis is full, changes V, T and B by a small matrix and leaves C alone (thick restart).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from curvspace.inner import PIECE, inner, norm

POWER_ITERATIONS = 3
"""For the size of the terms that cancel in a product, of which the order of magnitude is enough."""

CHUNK_BYTES = 4 * 2**20
"""Of a piece of the basis that is rotated at once, in place: it stays in the processor's cache."""


class SymmetricOperator(Protocol):
    """What the solvers need: ``shape``, ``dtype``, ``device`` and products with vectors (P,) and matrices (P, m)."""

    shape: Any
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, v: Tensor) -> Tensor: ...


def plain_operator(A: SymmetricOperator, user: str) -> SymmetricOperator:
    """A, a tensor without its graph; a ``ValueError`` unless it is square and of a real floating type."""
    if tuple(A.shape) != (A.shape[0], A.shape[0]):
        raise ValueError(f"{user} needs a square operator, got shape {tuple(A.shape)}")
    if not A.dtype.is_floating_point:
        raise ValueError(
            f"{user} needs an operator of a real floating type, got {A.dtype}: convert it, as by A.double()"
        )
    return A.detach() if isinstance(A, Tensor) else A


class KrylovBasis:
    """Orthonormal rows V (``size``, P), the projected matrix T, candidates C and couplings B (see the module).

    T, B and all decisions are float64 on the CPU and, in a process group, those of its first rank. Products are divided
    by ``unit``, a power of two near the first one's largest entry: T is of order one whatever the operator's scale.
    """

    def __init__(self, A: SymmetricOperator, capacity: int, generator: torch.Generator, bar: Any = None):
        self.A = A
        self.generator = generator
        self.bar = tqdm(disable=True) if bar is None else bar
        self.products = 0
        self.size = 0
        self.unit = 0.0
        self.largest = 0.0
        """Longest product so far: a lower bound of |A|."""
        self.dtype = torch.promote_types(A.dtype, torch.float32)
        self.eps = torch.finfo(self.dtype).eps
        self.asymmetry = 5 * torch.finfo(A.dtype).eps ** 0.5
        self.noise = 0.0
        """Largest rounding met beyond the usual one: see :meth:`is_rounding`."""
        self.group = getattr(A, "group", None)
        self.V = torch.empty(capacity, A.shape[0], dtype=self.dtype, device=A.device)
        self.C = self.V[:0]
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        self._couplings = torch.zeros(0, capacity, dtype=torch.float64, device="cpu")
        self._orthogonal: list[bool] = []
        """Of each candidate, whether it is orthogonal to V to rounding as it stands."""

    @property
    def T(self) -> Tensor:
        return self._projected[: self.size, : self.size]

    @property
    def B(self) -> Tensor:
        return self._couplings[:, : self.size]

    def agreed(self, values: Tensor) -> Tensor:
        """The first rank's values on every rank, so that all take the same decisions."""
        if self.group is not None:
            torch.distributed.broadcast(values, group=self.group, group_src=0)
        return values

    def offer(self, vectors: Tensor | None = None) -> None:
        """Add candidates (m, P) that belong to no product: start vectors, or one random vector."""
        if vectors is None:
            vectors = torch.randn(1, self.V.shape[1], generator=self.generator, dtype=torch.float64, device="cpu")
        vectors = self.agreed(vectors.detach().to(self.V).contiguous())
        self.C = torch.cat([self.C, vectors])
        self._couplings = torch.cat(
            [self._couplings, torch.zeros(len(vectors), self._couplings.shape[1], device="cpu").double()]
        )
        self._orthogonal += [False] * len(vectors)

    def expand(self, p: int = -1) -> bool:
        """Take candidate p (default: the last) as the next vector and multiply; False if it lay in the span."""
        p = range(len(self.C))[p]
        j, candidate = self.size, self.C[p]
        length = self._orthonormalised(candidate, p)
        if length == 0:
            self._drop(p)
            return False
        self.V[j] = candidate
        row = length * self._couplings[p].clone()
        row += self._remove_from_others(p)
        self._multiply(self.V[j], out=candidate)
        self.size += 1
        column = self._orthogonal_part(candidate, row[:j])
        self._require_symmetric(column[:j], row[:j])
        self._projected[: j + 1, j] = self._projected[j, : j + 1] = column
        self._couplings[p] = 0
        self._couplings[p, j] = 1
        self._orthogonal[p] = True
        if self._length(candidate) <= 10 * self.eps * self.largest:
            self._drop(p)
        return True

    def _orthonormalised(self, v: Tensor, p: int) -> float:
        """v <- v / |v| without its part in the span, in place; returns |v|, or 0 if only rounding is left."""
        first = length = self._length(v)
        if length == 0:
            return 0.0
        v /= length
        if self._orthogonal[p]:
            return length
        smallest = 100 * self.eps
        left = 1.0
        for _ in range(4):
            self._remove(v)
            kept = self._length(v)
            left *= kept
            if left <= smallest:
                return 0.0
            v /= kept
            if kept > 0.5:
                return first * left
        return 0.0

    def _orthogonal_part(self, w: Tensor, row: Tensor) -> Tensor:
        """w <- w - V Vᵀ w in place, and Vᵀ w: first by the recurrence, then the span till nothing is left."""
        h = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        known = [int(i) for i in row.nonzero()]
        if len(known) <= 1:
            for i in (*known, self.size - 1):
                part = float(self._numbers(_coordinates(self.V[i : i + 1], w)))
                w.sub_(self.V[i], alpha=part)
                h[i] += part
        before = self._length(w)
        for _ in range(3):
            h += self._remove(w)
            after = self._length(w)
            if after > 0.5 * before or after <= self.eps * self.largest:
                break
            before = after
        return h

    def _remove(self, w: Tensor) -> Tensor:
        """w <- w - V Vᵀ w in place, once; returns Vᵀ w."""
        V = self.V[: self.size]
        h = self._numbers(_coordinates(V, w))
        small = h.to(V)
        for part, piece in zip(w.split(PIECE), V.split(PIECE, dim=1), strict=True):
            torch.addmv(part, piece.T, small, alpha=-1, out=part)
        return h

    def _remove_from_others(self, p: int) -> Tensor:
        """Make the other candidates orthogonal to the new vector C[p]; returns what that couples it with."""
        if len(self.C) == 1:
            return torch.zeros(self._couplings.shape[1], dtype=torch.float64, device="cpu")
        d = self.agreed(inner(self.C.T, self.C[p]))
        d[p] = 0
        self.C.addr_(d, self.C[p].clone(), alpha=-1)
        self._orthogonal = [False] * len(self.C)
        return d.double().cpu() @ self._couplings

    def _drop(self, p: int) -> None:
        keep = [i for i in range(len(self.C)) if i != p]
        self.C = self.C[keep] if keep else self.V[:0]
        self._couplings = self._couplings[keep]
        self._orthogonal = [self._orthogonal[i] for i in keep]

    def choose(self, s: Tensor) -> int:
        """The candidate for the Ritz pair with coordinates s: one that belongs to no product, else the pair's residual.

        With several candidates the residual is a combination of them, which takes the place of its largest part.
        """
        free = [i for i, b in enumerate(self.B) if not b.any()]
        if free or len(self.C) == 1:
            return free[0] if free else 0
        g = self.B @ s
        p = int((g.abs() * self.gram().diagonal().sqrt()).argmax())
        self.C[p] = (g / g[p]).to(self.C) @ self.C
        others = torch.arange(len(g), device="cpu") != p
        self._couplings[others] -= (g[others] / g[p])[:, None] * self._couplings[p]
        self._orthogonal[p] = False
        return p

    def gram(self) -> Tensor:
        """CᵀC, (c, c)."""
        if len(self.C) == 1:
            return torch.tensor([[self._length(self.C[0]) ** 2]], dtype=torch.float64, device="cpu")
        return self._numbers(inner(self.C.T, self.C.T, torch.float64))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values in units of ``unit``, ascending, and their coordinates in the basis as columns, (j, j)."""
        theta, s = torch.linalg.eigh(self.T)
        if self.group is None:
            return theta, s
        both = self.agreed(torch.cat([theta[None], s]).to(self.V.device)).cpu()
        return both[0], both[1:]

    def residual_norms(self, s: Tensor) -> Tensor:
        """|C B s| of each column of s."""
        g = self.B @ s
        return (g * (self.gram() @ g)).sum(0).clamp_min(0).sqrt()

    def vectors(self, s: Tensor) -> Tensor:
        """V s as rows, of unit length; the basis is used up."""
        self._rotate(s)
        rows = self.V[: s.shape[1]].clone()
        return rows.div_(norm(rows.T)[:, None])

    def restart(self, theta: Tensor, s: Tensor) -> None:
        """Keep these Ritz pairs alone."""
        self._couplings[:, : s.shape[1]] = self.B @ s
        self._rotate(s)
        self.size = s.shape[1]
        self._couplings[:, self.size :] = 0
        self._projected.zero_()
        self._projected[: self.size, : self.size] = torch.diag(theta)

    def _rotate(self, s: Tensor) -> None:
        """The first columns of V <- V s, in place, piece by piece."""
        small = s.T.to(self.V)
        width = max(CHUNK_BYTES // (self.size * self.V.element_size()), 1)
        for piece in self.V.split(width, dim=1):
            piece[: len(small)] = small @ piece[: self.size]

    def disagreement(self, s: Tensor) -> float:
        """|A u - (V T + C B) y| of one u = V y among the pairs with coordinates s, in longest products.

        The result of this product is known up to rounding. Where it is not, the residuals are not either.
        """
        signs = torch.where(torch.arange(s.shape[1], device="cpu") % 2 == 0, 1.0, -1.0).double()
        y = (s * signs).sum(1) / s.shape[1] ** 0.5
        V = self.V[: self.size]
        w = y.to(V) @ V
        self._multiply(w, out=w)
        torch.addmv(w, V.T, (self.T @ y).to(V), alpha=-1, out=w)
        if len(self.C):
            torch.addmv(w, self.C.T, (self.B @ y).to(V), alpha=-1, out=w)
        return self._length(w) / (self.largest or 1.0)

    def _multiply(self, v: Tensor, out: Tensor) -> None:
        """out <- A v in units of ``unit``."""
        product = self.A @ v.to(self.A.dtype)
        self.products += 1
        self.bar.update()
        if not self.unit:
            largest = float(self._numbers(torch.linalg.vector_norm(product, math.inf)))
            self.unit = 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 0.0
        torch.div(product.to(self.dtype), self.unit or 1.0, out=out)
        length = self._length(out)
        if not math.isfinite(length):
            raise RuntimeError(f"product {self.products} with the operator is not finite: NaN or overflow in the model")
        self.largest = max(self.largest, length)

    def is_rounding(self, difference: float) -> bool:
        """Whether two ways to one number are apart by what rounding explains; the largest such difference is kept.

        Usual rounding is relative to the longest product. What exceeds that may be that of terms that cancel.
        """
        if difference <= self.asymmetry * self.largest:
            return True
        if difference > self.rounding_of_terms:
            return False
        self.noise = max(self.noise, difference)
        return True

    @cached_property
    def rounding_of_terms(self) -> float:
        """A unit of rounding of the terms whose sum a product is, where the operator knows these, else 0.

        In the curvature of a network that has fitted its data, they are larger than the result by many orders of
        magnitude. Their norm comes from a few power iterations.
        """
        terms = getattr(self.A, "cancelling_terms", None)
        if terms is None:
            return 0.0
        operator, size = terms(), 0.0
        v = self.V[: max(self.size, 1)].sum(0)
        try:
            for _ in range(POWER_ITERATIONS):
                v = operator @ (v / (self._length(v) or 1.0)).to(operator.dtype)
                size = max(size, self._length(v))
        except (RuntimeError, ValueError):  # a loss that is not defined at outputs 0, a model without J v
            return 0.0
        return torch.finfo(operator.dtype).eps * size / (self.unit or 1.0) if math.isfinite(size) else 0.0

    def _require_symmetric(self, column: Tensor, row: Tensor) -> None:
        """Compare V_iᵀ A v_j with v_jᵀ A V_i, which the earlier products gave."""
        difference = float((column - row).abs().max()) if len(row) else 0.0
        if not self.is_rounding(difference):
            raise RuntimeError(
                f"the operator is not symmetric: uᵀAv and vᵀAu differ by {difference / self.largest:.1e} of |A|, more "
                f"than {self.A.dtype} rounds: a second derivative of the model is wrong, "
                "or inexact: if float64 helps, or autocast inside it computes in fewer bits"
            )

    def _numbers(self, values: Tensor) -> Tensor:
        return self.agreed(values).double().cpu()

    def _length(self, v: Tensor) -> float:
        return float(self._numbers(norm(v)))


def _coordinates(V: Tensor, w: Tensor) -> Tensor:
    """V w of rows V in float64; the products of a piece in the basis's own dtype, for this is most of the time."""
    parts = [piece @ part for part, piece in zip(w.split(PIECE), V.split(PIECE, dim=1), strict=True)]
    return torch.stack(parts).sum(0, dtype=torch.float64)
