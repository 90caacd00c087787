r"""A few extreme eigenpairs of a symmetric operator by Rayleigh-Ritz on a growing orthonormal basis.

With V (P, j) orthonormal and W = A V kept, the Ritz pairs :math:`(\theta, Vs)` of the small matrix :math:`V^\top W`
approximate eigenpairs, and their true residuals :math:`|A V s - \theta V s| = |(W - \theta V) s|` cost no product. The
basis grows by the residual of the first wanted pair that has not converged. From one start vector this is the Lanczos
iteration with full reorthogonalisation; keeping Ritz vectors when the basis is full (:math:`V \leftarrow VS`,
:math:`W \leftarrow WS`) is its thick restart. Unlike Lanczos it takes any start subspace, and both ends at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

Which = Literal["LA", "SA", "LM", "BE"]
RelativeTo = Literal["spectrum", "wanted"]

PROBE = 3
"""Products spent on a fresh random direction before a result is believed: see :func:`_probe`."""

DISCOVERY = 30
"""Products before a pair is believed whose eigenvalue the tolerance cannot tell from zero: of a large operator with few
outliers any random vector is such a pair, and the end of the spectrum shows only in a Krylov sequence."""

BASIS_BYTES = 256 * 2**20
"""Memory that V and W may take before restarts set in, unless ``max_basis`` says otherwise."""


class SymmetricOperator(Protocol):
    """What the solvers need: ``shape``, ``dtype``, ``device`` and products with vectors (P,) and matrices (P, m)."""

    shape: Any
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EigenPairs:
    r"""Eigenpairs :math:`A u_i \approx \lambda_i u_i` and how good they are.

    Attributes
    ----------
    values : (k,), ordered as ``which`` says
    vectors : (P, k), orthonormal columns
    residuals : (k,), the true residuals :math:`|A u_i - \lambda_i u_i|`
    products : matrix-vector products spent
    converged : whether every residual is within the tolerance
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def eigsh(
    A: SymmetricOperator,
    k: int,
    which: Which = "LA",
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_products: int | None = None,
    max_basis: int | None = None,
    seed: int = 0,
    progress: bool = False,
    *,
    relative_to: RelativeTo = "spectrum",
) -> EigenPairs:
    r"""k extreme eigenpairs of a symmetric operator, each with :math:`|Au - \lambda u| \le tol\,|\lambda|_{max}`.

    Parameters
    ----------
    A
        Anything with ``.shape``, ``.dtype``, ``.device`` and ``@``: an operator of this package, a square tensor.
    which
        ``"LA"`` largest, ``"SA"`` smallest (most negative first), ``"LM"`` largest magnitude, ``"BE"`` half from
        each end (largest first; of an odd number one more from the top).
    tol
        Relative to the largest magnitude among the Ritz values; not taken below rounding (20 units of it).
    v0
        Start vector (P,) or start subspace (P, m), for example the eigenvectors at an earlier checkpoint.
    max_products
        Budget (default: the larger of 300 and 20 k). When it ends first there is a warning and ``converged=False``.
    max_basis
        Vectors held before a restart; two of length P are kept for each (default: what fits in 256 MB, at most 200).
    seed
        Of the random start vector, drawn on the CPU: the same on every device.
    progress
        Show a progress bar of products.
    relative_to
        ``"wanted"``: the tolerance is relative to the largest magnitude among the k pairs themselves. For the weakly
        negative end of a spectrum with large positive outliers: there ``"spectrum"`` accepts a residual that is
        small next to the outliers, but not next to the eigenvalue.

    Raises
    ------
    ValueError
        If k is not in 1..P, or an option has no meaning.
    RuntimeError
        If A is not deterministic or returns values that are not finite.
    """
    n = _checked_size(A, k, which, tol)
    if relative_to not in ("spectrum", "wanted"):
        raise ValueError(f'relative_to must be "spectrum" or "wanted", got {relative_to!r}')
    max_products = max(300, 20 * k) if max_products is None else max_products
    max_basis = min(n, _default_basis(A, k) if max_basis is None else max(max_basis, k + 2))
    basis = RitzBasis(A, max_basis, torch.Generator().manual_seed(seed), tqdm(disable=not progress, unit="product"))
    _start(basis, v0, which, tol)
    before_probe: Tensor | None = None
    while True:
        pairs = _wanted_pairs(basis, k, which, tol, relative_to)
        telling = pairs.beyond_zero or basis.products >= min(DISCOVERY, max_products)
        found = pairs.converged and telling
        if basis.size == n or (found and pairs.unchanged(before_probe)) or basis.products >= max_products:
            break
        if basis.size == max_basis:
            basis.restart(pairs.s, _select(pairs.theta, k + (max_basis - k) // 2, which))
        elif found:
            before_probe = pairs.values
            _probe(basis)
        else:
            more = pairs.open or ([] if telling else [0])
            basis.append(pairs.residuals[more[0]] if more else basis.random())
            basis.bar.set_postfix_str(f"{k - len(pairs.open)}/{k} pairs, worst residual {max(pairs.lengths):.1e}")
    basis.bar.close()
    if not found:
        warnings.warn(
            f"eigsh: not converged after {basis.products} products: worst residual {max(pairs.lengths):.1e}, "
            f"asked for {pairs.bound:.1e} (tol {tol:.1e} of |lambda|_max {pairs.scale:.1e})",
            RuntimeWarning,
            stacklevel=2,
        )
    values = pairs.values.to(A.device, basis.V.dtype)
    errors = torch.tensor(pairs.lengths, dtype=values.dtype, device=values.device)
    return EigenPairs(values, basis.vectors(pairs.s, pairs.indices), errors, basis.products, found)


@dataclass(frozen=True)
class _WantedPairs:
    """The wanted ones among a basis's Ritz pairs, and what the tolerance says of them."""

    k: int
    theta: Tensor
    """All Ritz values, ascending."""
    s: Tensor
    """All Ritz vectors, in the basis, as columns."""
    indices: list[int]
    """Of the wanted pairs, in the order in which they are reported; fewer than k while the basis is smaller."""
    residuals: Tensor
    """Residual vectors of the wanted pairs, one a row; ``lengths`` are their norms."""
    lengths: list[float]
    scale: float
    """What the tolerance is relative to."""
    bound: float
    """What a residual may be: tol times the scale, or the rounding of the products."""

    @property
    def values(self) -> Tensor:
        return self.theta[self.indices]

    @property
    def open(self) -> list[int]:
        """Which of the wanted pairs have not converged."""
        return [i for i, length in enumerate(self.lengths) if length > self.bound]

    @property
    def converged(self) -> bool:
        return len(self.indices) == self.k and not self.open

    @property
    def beyond_zero(self) -> bool:
        """Whether the tolerance tells every wanted value from zero."""
        return float(self.values.abs().min()) > self.bound

    def unchanged(self, before: Tensor | None) -> bool:
        """Whether the values are those of ``before``, as far as the tolerance can tell."""
        return before is not None and bool((self.values - before).abs().max() <= self.bound)


def _wanted_pairs(basis: RitzBasis, k: int, which: Which, tol: float, relative_to: RelativeTo) -> _WantedPairs:
    theta, s = basis.ritz()
    indices = _select(theta, min(k, len(theta)), which)
    residuals = basis.residuals(theta, s, indices)
    largest = float(theta.abs().max())
    scale = largest if relative_to == "spectrum" else float(theta[indices].abs().max())
    bound = max(tol * scale, 20 * torch.finfo(basis.V.dtype).eps * largest)
    return _WantedPairs(k, theta, s, indices, residuals, residuals.norm(dim=1).tolist(), scale, bound)


def _checked_size(A: SymmetricOperator, k: int, which: str, tol: float) -> int:
    n = A.shape[0]
    if tuple(A.shape) != (n, n):
        raise ValueError(f"eigsh needs a square operator, got shape {tuple(A.shape)}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and P = {n}, got {k}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f'which must be "LA", "SA", "LM" or "BE", got {which!r}')
    if tol < 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    return n


def _default_basis(A: SymmetricOperator, k: int) -> int:
    affordable = BASIS_BYTES // (2 * A.shape[0] * torch.empty(0, dtype=A.dtype).element_size())
    return max(4 * k, k + 30, min(200, affordable))


def _select(theta: Tensor, k: int, which: Which) -> list[int]:
    """Indices of the k wanted among ascending Ritz values, in the order in which they are reported."""
    n = len(theta)
    if which == "LA":
        return list(range(n - 1, n - 1 - k, -1))
    if which == "SA":
        return list(range(k))
    if which == "LM":
        return torch.argsort(theta.abs(), descending=True, stable=True)[:k].tolist()
    top = (k + 1) // 2
    return list(range(n - 1, n - 1 - top, -1)) + list(range(k - top - 1, -1, -1))


def _start(basis: RitzBasis, v0: Tensor | None, which: Which, tol: float) -> None:
    """The first vectors of the basis.

    Each column of a start subspace costs a product. That pays for slowly converging ends and for a subspace that has
    hardly moved, which the product with the sum of the columns tells. Else, at the top, the Krylov sequence of that
    sum is the cheaper start.
    """
    n = basis.V.shape[1]
    if v0 is None:
        basis.append(basis.random())
        basis.require_deterministic()
        return
    if v0.ndim not in (1, 2) or v0.shape[0] != n:
        raise ValueError(f"v0 must be (P,) or (P, m) with P = {n}, got {tuple(v0.shape)}")
    columns = list(v0.detach().to(basis.V).reshape(n, -1).T)[: len(basis.V)]
    basis.append(torch.stack(columns).sum(0))
    basis.require_deterministic()
    if which in ("LA", "LM") and len(columns) > 3:
        span, _ = torch.linalg.qr(torch.stack(columns, 1))
        drift = (basis.W[0] - span @ (span.T @ basis.W[0])).norm()
        if drift > 3 * tol * basis.W[0].norm():
            return
    for column in columns[1:]:
        basis.append(column)


def _probe(basis: RitzBasis) -> None:
    """A short Krylov sequence from a random vector orthogonal to all that is known.

    A sequence from one vector sees a repeated eigenvalue once, and a converged start subspace sees nothing else at
    all. If a wanted pair was missed, the wanted Ritz values change, and the iteration goes on until a probe changes
    nothing.
    """
    basis.append(basis.random())
    for _ in range(PROBE - 1):
        if basis.size < len(basis.V):
            basis.append(basis.W[basis.size - 1])


class RitzBasis:
    """Orthonormal rows V, their images W = A V, and the projected matrix in float64, kept up to date together."""

    def __init__(self, A: SymmetricOperator, max_size: int, generator: torch.Generator, bar: Any = None):
        self.A = A
        self.generator = generator
        self.bar = tqdm(disable=True) if bar is None else bar
        self.products = 0
        self.size = 0
        self.closed = False
        """Whether the last vector offered lay in the span already: the span is invariant."""
        self.V = torch.empty(max_size, A.shape[0], dtype=A.dtype, device=A.device)
        self.W = torch.empty_like(self.V)
        self._projected = torch.zeros(max_size, max_size, dtype=torch.float64)

    def random(self) -> Tensor:
        return torch.randn(self.V.shape[1], generator=self.generator, dtype=torch.float64).to(self.V)

    def append(self, v: Tensor) -> None:
        """Orthonormalise v against the basis and multiply; a vector inside the span gives way to a random one."""
        unit = self._orthonormalised(v)
        self.closed = unit is None
        while unit is None:
            unit = self._orthonormalised(self.random())
        self.V[self.size] = unit
        w = self._multiply(unit)
        self.W[self.size] = w
        self.size += 1
        column = (self.V[: self.size] @ w).double().cpu()
        self._projected[: self.size, self.size - 1] = column
        self._projected[self.size - 1, : self.size] = column

    def _orthonormalised(self, v: Tensor) -> Tensor | None:
        """v / |v| after removing the span (twice is enough, unless nothing but rounding is left)."""
        V = self.V[: self.size]
        length = v.norm()
        smallest = 100 * torch.finfo(v.dtype).eps * length
        for _ in range(3):
            if length <= smallest:
                return None
            smallest, v = smallest / length, v / length
            v = v - V.T @ (V @ v)
            v = v - V.T @ (V @ v)
            length = v.norm()
            if length > 0.5:
                return v / length
        return None

    def _multiply(self, v: Tensor) -> Tensor:
        w = self.A @ v
        self.products += 1
        self.bar.update()
        if not torch.isfinite(w).all():
            raise RuntimeError(f"product {self.products} with the operator is not finite: NaN or overflow in the model")
        return w

    def require_deterministic(self) -> None:
        """Multiply the first vector again (operators that have checked their model themselves are spared)."""
        if getattr(self.A, "deterministic", False):
            return
        difference = (self._multiply(self.V[0]) - self.W[0]).norm()
        if difference > 1e3 * torch.finfo(self.V.dtype).eps * self.W[0].norm():
            raise RuntimeError(
                f"the operator is not deterministic: two products of the same vector differ by "
                f"{float(difference / self.W[0].norm()):.1e} of their length"
            )

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and their coordinates in the basis, (j, j)."""
        theta, s = torch.linalg.eigh(self._projected[: self.size, : self.size])
        return theta, s

    def _combined(self, rows: Tensor, s: Tensor) -> Tensor:
        return s.T.to(rows) @ rows[: self.size]

    def residuals(self, theta: Tensor, s: Tensor, wanted: list[int]) -> Tensor:
        """A u - theta u of the wanted Ritz pairs, one a row."""
        return self._combined(self.W, s[:, wanted]) - self._combined(self.V, s[:, wanted] * theta[wanted])

    def vectors(self, s: Tensor, wanted: list[int]) -> Tensor:
        """The wanted Ritz vectors, orthonormal columns (P, k)."""
        u = self._combined(self.V, s[:, wanted])
        return (u / u.norm(dim=1, keepdim=True)).T.contiguous()

    def restart(self, s: Tensor, keep: list[int]) -> None:
        """Keep these Ritz vectors alone."""
        V, W = self._combined(self.V, s[:, keep]), self._combined(self.W, s[:, keep])
        self.size = len(keep)
        self.V[: self.size], self.W[: self.size] = V, W
        projected = (V @ W.T).double().cpu()
        self._projected[: self.size, : self.size] = (projected + projected.T) / 2
