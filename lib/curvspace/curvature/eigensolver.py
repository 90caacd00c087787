r"""A few extreme eigenpairs of a symmetric operator: Lanczos with full reorthogonalisation and thick restart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from curvspace.arithmetic import in_own_arithmetic
from curvspace.curvature.krylov import KrylovBasis, SymmetricOperator, plain_operator
from curvspace.curvature.memory import free_memory
from curvspace.inner import inner, norm
from curvspace.progress import bar

Which = Literal["LA", "SA", "LM", "BE"]

PROBE = (3, 12)
"""Products spent on a fresh random direction before a result is believed, at least and at most: see :func:`_probe`."""

DISCOVERY = 30
"""Products before a pair is believed whose eigenvalue cannot be told from zero: of a large operator with few outliers
any random vector is such a pair, and the end of the spectrum shows only in a Krylov sequence."""

BASIS_BYTES = 2**30
"""Memory that the basis may take before restarts set in, unless ``max_basis`` says otherwise."""

ROUNDING = 20
"""Units of rounding, relative to the largest eigenvalue, below which a residual says nothing."""


@dataclass(frozen=True, repr=False)
class EigenPairs:
    r"""Eigenpairs :math:`A u_i \approx \lambda_i u_i` and how good they are; ``print`` shows them as a table.

    Attributes
    ----------
    values : (k,), ordered as ``which`` says
    vectors : (P, k), orthonormal columns
    residuals : (k,), the residuals :math:`r_i = |A u_i - \lambda_i u_i|`
    products : matrix-vector products spent
    converged : whether every residual is within the tolerance
    errors : (k,), bounds of the values' errors: some eigenvalue of A lies within :math:`r_i` of each value, and within
        :math:`r_i^2/\delta_i` if it is :math:`\delta_i` from the others; the smaller, with :math:`\delta_i` as far as
        the solver saw the spectrum
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool
    errors: Tensor

    def __str__(self) -> str:
        lines = ["  i       eigenvalue    error  residual"]
        for i, (value, error, residual) in enumerate(zip(self.values, self.errors, self.residuals, strict=True), 1):
            lines.append(f"{i:3d}  {float(value):15.8g}  {float(error):7.1e}   {float(residual):7.1e}")
        state = "converged" if self.converged else "NOT converged"
        return "\n".join([*lines, f"{len(self.values)} eigenpairs, {self.products} products, {state}"])

    __repr__ = __str__


@in_own_arithmetic
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
) -> EigenPairs:
    r"""k extreme eigenpairs of a symmetric operator, each with :math:`|Au - \lambda u| \le tol\,|\lambda|`.

    The tolerance is relative to each pair's own eigenvalue, as in ARPACK and scipy's ``eigsh``. A residual below
    :math:`20\,\epsilon\,|\lambda|_{max}` is within rounding and counts as converged, :math:`\epsilon` = 1.2e-7 for
    float32: an eigenvalue that small next to the largest is known no better than that. Nor is any eigenvalue where the
    whole matrix is of the size of rounding (a network that has fitted its data): ``errors`` say how well.

    Parameters
    ----------
    A
        Anything with ``.shape``, ``.dtype``, ``.device`` and ``@``: an operator of this package, a square tensor.
        In a process group (``A.group``) all ranks return the same pairs.
    which
        ``"LA"`` largest, ``"SA"`` smallest (most negative first), ``"LM"`` largest magnitude, ``"BE"`` half from
        each end (largest first; of an odd number one more from the top).
    tol
        0 asks for what rounding allows.
    v0
        Start vector (P,) or start subspace (P, m), for example the eigenvectors at an earlier checkpoint. The m
        columns are multiplied one by one only if they are nearly eigenvectors still; else their sum is the start.
    max_products
        Budget (default: the larger of 300 and 20 k). When it ends first there is a warning and ``converged=False``.
    max_basis
        Vectors of length P held before a restart (default: what fits in 1 GB, at most 200 and at least 2 k + 10). Two
        more are needed for the work and k for the result; ARPACK holds max(2 k + 1, 20) + 4 and k.
    seed
        Of the random start vector, drawn on the CPU: the same on every device.
    progress
        Show the count of products: a bar, in a log file a line a minute.

    Raises
    ------
    ValueError
        If k is not in 1..P, an option has no meaning, or tol is positive and below the rounding of ``A.dtype``.
    RuntimeError
        If A is not deterministic, not symmetric, or returns values that are not finite.
    MemoryError
        If the free memory does not hold a basis of k + 4 vectors.
    """
    A = plain_operator(A, "eigsh")
    _check(A, k, which, tol)
    max_products = max(300, 20 * k) if max_products is None else max_products
    shown = bar(desc="eigsh", unit="product", show=progress)
    basis = KrylovBasis(A, _capacity(A, k, max_basis), torch.Generator().manual_seed(seed), shown)
    _start(basis, v0, tol)
    pairs, found = _iterate(basis, k, which, tol, max_products)
    result = _finished(basis, pairs, found, max_products)
    shown.close()
    return result


@dataclass(frozen=True)
class _WantedPairs:
    """The wanted ones among a basis's Ritz pairs, and what the tolerance says of them, in units of ``basis.unit``."""

    k: int
    theta: Tensor
    """All Ritz values, ascending."""
    s: Tensor
    """All Ritz vectors, in the basis, as columns."""
    indices: list[int]
    """Of the wanted pairs, in the order in which they are reported; fewer than k while the basis is smaller."""
    lengths: Tensor
    """Residual norms of all pairs."""
    tol: float
    rounding: float
    """What a residual must exceed to mean anything."""

    @property
    def values(self) -> Tensor:
        return self.theta[self.indices]

    @property
    def coordinates(self) -> Tensor:
        return self.s[:, self.indices]

    @property
    def residuals(self) -> Tensor:
        return self.lengths[self.indices]

    @property
    def bounds(self) -> Tensor:
        """What each residual may be: its own tolerance, or rounding."""
        return (self.tol * self.values.abs()).clamp_min(self.rounding)

    @property
    def open(self) -> list[int]:
        """Which of the wanted pairs have not converged."""
        return (self.residuals > self.bounds).nonzero()[:, 0].tolist()

    @property
    def converged(self) -> bool:
        return len(self.indices) == self.k and not self.open

    @property
    def beyond_zero(self) -> bool:
        """Whether every wanted value can be told from zero."""
        return bool((self.values.abs() > self.bounds).all())

    @property
    def errors(self) -> Tensor:
        """min(r, r²/gap) of the wanted pairs, the gap to where any other Ritz value may lie; not below rounding."""
        distance = (self.theta - self.values[:, None]).abs() - self.lengths
        distance[range(len(self.indices)), self.indices] = torch.inf
        gap = distance.min(1).values
        r = self.residuals
        bound = torch.where(gap > r, r.square() / gap, r) if len(self.theta) > 1 else r
        return bound.clamp_min(self.rounding)

    def unchanged(self, before: Tensor) -> bool:
        """Whether the values are those of ``before``, as far as the tolerance can tell."""
        return bool(((self.values - before).abs() <= self.bounds).all())

    def with_errors_of_products(self, error: float, noise: float) -> _WantedPairs:
        """The same pairs with residuals that count what is wrong with a product along them."""
        rounding = max(self.rounding, 2 * noise)
        return replace(self, lengths=(self.lengths.square() + error**2).sqrt(), rounding=rounding)


def _iterate(basis: KrylovBasis, k: int, which: Which, tol: float, max_products: int) -> tuple[_WantedPairs, bool]:
    """Grow the basis until the wanted pairs have converged and a probe changes nothing, or the budget ends."""
    capacity, n = basis.V.shape
    before_probe: Tensor | None = None
    while True:
        pairs = _wanted_pairs(basis, k, which, tol)
        complete = basis.size == n
        telling = complete or pairs.beyond_zero or basis.products >= min(DISCOVERY, max_products)
        found = pairs.converged and telling
        sure = found and before_probe is not None and pairs.unchanged(before_probe)
        if complete or sure or basis.products >= max_products:
            return pairs, found
        room = min(PROBE[1], capacity - k - 1)
        if basis.size + (room if found else 1) > capacity < n:
            keep = _select(pairs.theta, min(k + (capacity - k) // 2, capacity - room), which)
            basis.restart(pairs.theta[keep], pairs.s[:, keep])
        elif found:
            before_probe = pairs.values
            _probe(basis, pairs, which, max_products)
        else:
            _grow(basis, pairs)


def _wanted_pairs(basis: KrylovBasis, k: int, which: Which, tol: float) -> _WantedPairs:
    theta, s = basis.ritz()
    rounding = max(ROUNDING * basis.eps * float(theta.abs().max()), 2 * basis.noise)
    return _WantedPairs(k, theta, s, _select(theta, min(k, len(theta)), which), basis.residual_norms(s), tol, rounding)


def _grow(basis: KrylovBasis, pairs: _WantedPairs) -> None:
    """One more vector: the residual of the first wanted pair that has not converged, or a random one."""
    if len(basis.C) == 0:
        basis.offer()
    first = pairs.open[0] if pairs.open else 0
    basis.expand(basis.choose(pairs.coordinates[:, first]))
    worst = float(pairs.residuals.max()) * basis.unit
    basis.bar.set_postfix_str(f"{len(pairs.indices) - len(pairs.open)}/{pairs.k} pairs, worst residual {worst:.1e}")


def _probe(basis: KrylovBasis, pairs: _WantedPairs, which: Which, max_products: int) -> None:
    r"""A short Krylov sequence from a random vector orthogonal to all that is known.

    A sequence from one vector sees a repeated eigenvalue once, of two close ones often one alone, and a converged start
    subspace sees nothing else at all. If a wanted pair was missed, the wanted Ritz values change, and the iteration
    goes on until a probe changes nothing. A random vector holds about :math:`1/\sqrt P` of each eigenvector. With the
    rest of the spectrum in [a, b], the Chebyshev polynomial of degree m raises that of a missed one at the wanted end
    :math:`\theta` to more than all others' by

    .. math:: \cosh\bigl(m\,\mathrm{arcosh}\,x\bigr) \ge \sqrt P, \qquad x = 1 + 2\,\frac{\theta - b}{b - a}.

    a and b are the extreme Ritz values of the probe itself, as far as it has come.
    """
    basis.offer()
    candidates, first = len(basis.C), basis.size
    for taken in range(PROBE[1]):
        if len(basis.C) != candidates or basis.size == len(basis.V) or basis.products >= max_products:
            return
        if taken >= PROBE[0] and taken > _degree(torch.linalg.eigvalsh(basis.T[first:, first:]), pairs, which, basis):
            return
        basis.expand(-1)


def _degree(rest: Tensor, pairs: _WantedPairs, which: Which, basis: KrylovBasis) -> float:
    """The degree m of :func:`_probe` for a rest of the spectrum between the extremes of ``rest``."""
    a, b = float(rest[0]), float(rest[-1])
    wanted = pairs.values
    edges = {
        "LA": [float(wanted.min()) - b],
        "SA": [a - float(wanted.max())],
        "LM": [float(wanted.abs().min()) - b, a + float(wanted.abs().min())],
        "BE": [float(wanted[: (pairs.k + 1) // 2].min()) - b, a - float(wanted[-(pairs.k // 2) :].max())],
    }[which]
    distance = min(edges[:1] if pairs.k == 1 else edges)
    if distance <= 0 or b <= a:
        return math.inf if distance <= 0 else 0.0
    growth = math.acosh(1 + 2 * distance / (b - a))
    return math.acosh(math.sqrt(basis.V.shape[1])) / growth if growth else math.inf


def _start(basis: KrylovBasis, v0: Tensor | None, tol: float) -> None:
    """The first vector, multiplied, and multiplied again if A has not been checked.

    Of a start subspace it is the sum of the columns. Multiplying each column pays only where they are nearly
    eigenvectors still; where the product leaves the subspace, the Krylov sequence of the sum is cheaper.
    """
    columns = None if v0 is None else _columns(v0, basis)
    if columns is not None:
        basis.offer(columns.sum(0, keepdim=True))
        basis.expand(0)
        if len(columns) > 1 and _drift(basis, columns) <= 3 * tol:
            basis.offer(columns[1:])
    while basis.size == 0:
        basis.offer()
        basis.expand()
    if getattr(basis.A, "deterministic", False):
        return
    difference = basis.disagreement(torch.ones(1, 1, device="cpu").double())
    if difference > 1e3 * torch.finfo(basis.A.dtype).eps:
        raise RuntimeError(
            f"the operator is not deterministic: two products of the same vector differ "
            f"by {difference:.1e} of their length"
        )


def _columns(v0: Tensor, basis: KrylovBasis) -> Tensor:
    n = basis.V.shape[1]
    if v0.ndim not in (1, 2) or v0.shape[0] != n:
        raise ValueError(f"v0 must be (P,) or (P, m) with P = {n}, got {tuple(v0.shape)}")
    return v0.detach().to(basis.V).reshape(n, -1).T[: len(basis.V)]


def _drift(basis: KrylovBasis, columns: Tensor) -> float:
    """How far the product with the columns' sum lies outside their span, relative to its length."""
    if len(basis.C) == 0:
        return 0.0
    gram, along = inner(columns.T, columns.T, torch.float64), inner(columns.T, basis.C[0], torch.float64)
    outside = basis.C[0] - torch.linalg.lstsq(gram.cpu(), along.cpu()[:, None]).solution[:, 0].to(columns) @ columns
    return float(basis.agreed(norm(outside))) / basis.largest


def _finished(basis: KrylovBasis, pairs: _WantedPairs, found: bool, max_products: int) -> EigenPairs:
    """The result, after one product along all pairs at once that must agree with what the basis says of them."""
    if basis.products < max_products:
        difference = basis.disagreement(pairs.coordinates)
        if not basis.is_rounding(difference * basis.largest):
            raise RuntimeError(
                f"products with the operator contradict each other by {difference:.1e} of the largest: it is "
                f"not linear, not deterministic, or {basis.A.dtype} is too inexact for it (or autocast inside a model)"
            )
        pairs = pairs.with_errors_of_products(difference * basis.largest, basis.noise)
    unit = basis.unit or 1.0
    converged = found and pairs.converged
    if not converged:
        _warn(basis, pairs, unit)
    numbers = [x.mul(unit).to(basis.V) for x in (pairs.values, pairs.residuals, pairs.errors)]
    return EigenPairs(numbers[0], basis.vectors(pairs.coordinates).T, numbers[1], basis.products, converged, numbers[2])


def _warn(basis: KrylovBasis, pairs: _WantedPairs, unit: float) -> None:
    """Say which pair is worst, and what to do."""
    worst = int((pairs.residuals / pairs.bounds).argmax())
    found, asked = (float(x[worst]) * unit for x in (pairs.residuals, pairs.bounds))
    warnings.warn(
        f"eigsh: not converged after {basis.products} products: {len(pairs.open)} of {pairs.k} pairs; the worst, "
        f"eigenvalue {float(pairs.values[worst]) * unit:.4g}, has residual {found:.1e} where tol {pairs.tol:.1e} "
        f"asks for {asked:.1e}: give more products (max_products) or a larger tol; {basis.A.dtype} may be too inexact",
        RuntimeWarning,
        stacklevel=4,
    )


def _check(A: SymmetricOperator, k: int, which: str, tol: float) -> None:
    n = A.shape[0]
    if not isinstance(k, Integral):
        raise ValueError(f"k must be a whole number, got {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and P = {n}, got {k}")
    if which not in get_args(Which):
        raise ValueError(f'which must be "LA", "SA", "LM" or "BE", got {which!r}')
    if not tol >= 0:
        raise ValueError(f"tol must not be negative or NaN, got {tol}")
    rounding = torch.finfo(A.dtype).eps
    if 0 < tol < rounding:
        raise ValueError(
            f"tol {tol:g} is below the rounding of {A.dtype}, {rounding:.1e}: "
            "take an operator of a finer dtype or a larger tol"
        )


def _capacity(A: SymmetricOperator, k: int, max_basis: int | None) -> int:
    """Vectors that the basis may hold: see ``max_basis`` of :func:`eigsh`; never more than half of the free memory."""
    row = A.shape[0] * torch.finfo(torch.promote_types(A.dtype, torch.float32)).bits // 8
    wanted = max(2 * k + 10, min(200, BASIS_BYTES // row)) if max_basis is None else max(max_basis, k + PROBE[0] + 1)
    there = free_memory(A.device) // 2 // row
    if there < min(k + PROBE[0] + 1, A.shape[0]):
        raise MemoryError(
            f"eigsh needs {k + PROBE[0] + 1} vectors of {row / 2**20:.0f} MB, and there is memory for {there}"
        )
    return min(wanted, there, A.shape[0])


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
