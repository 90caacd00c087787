r"""A few extreme eigenpairs of a symmetric operator by Rayleigh-Ritz on a growing orthonormal basis.

With V (P, j) orthonormal and W = A V kept, the Ritz pairs of the small matrix :math:`V^\top W` approximate the
eigenpairs, and their true residuals :math:`|A u - \theta u| = |(W - \theta V) s|` cost no further product. The basis grows by
the residual of the first wanted pair that has not converged. From a single start vector that is the Lanczos
iteration with full reorthogonalisation, and keeping the Ritz vectors on a restart (:math:`V \leftarrow VS`,
:math:`W \leftarrow WS`) is its thick restart; unlike Lanczos, any start subspace will do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM", "BE"]


class SymmetricOperator(Protocol):
    """What the solvers need: ``shape``, ``dtype``, ``device`` and products with vectors and matrices."""

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
) -> EigenPairs:
    r"""k extreme eigenpairs of a symmetric operator, each with :math:`|A u - \lambda u| \le` ``tol`` :math:`\cdot |\lambda|_{max}`.

    Parameters
    ----------
    A
        Anything with ``.shape``, ``.dtype``, ``.device`` and ``@``.
    which
        ``"LA"`` largest, ``"SA"`` smallest (most negative first), ``"LM"`` largest magnitude, ``"BE"`` half from
        each end (largest first; the odd one from the top).
    v0
        Start vector (P,) or start subspace (P, m), for example the eigenvectors at an earlier checkpoint.
    max_products
        Budget; when it ends before convergence there is a warning and ``converged=False``.
    max_basis
        Vectors held before a restart (two of length P are kept for each).

    Raises
    ------
    ValueError
        If k is not in 1..P, or an option has no meaning.
    RuntimeError
        If A is not deterministic or returns values that are not finite.
    """
    n = A.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and P = {n}, got {k}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f'which must be "LA", "SA", "LM" or "BE", got {which!r}')
    max_products = max(20 * k, 300) if max_products is None else max_products
    max_basis = min(n, max(4 * k, k + 30) if max_basis is None else max(max_basis, k + 2))
    basis = _RitzBasis(A, max_basis, torch.Generator(device="cpu").manual_seed(seed))
    basis.start(v0)
    while True:
        theta, s = basis.ritz()
        wanted = _select(theta, min(k, len(theta)), which)
        residuals = basis.residual_norms(theta, s, wanted)
        bound = tol * float(theta.abs().max())
        unconverged = [i for i, r in zip(wanted, residuals, strict=True) if r > bound]
        if len(wanted) == k and (not unconverged or basis.size == n):
            converged = True
            break
        if basis.products >= max_products:
            converged = False
            break
        if basis.size == max_basis:
            basis.restart(s, _select(theta, min(len(theta), k + (max_basis - k) // 2), which))
            continue
        basis.expand(theta, s, unconverged[0] if unconverged else None)
    if not converged:
        worst = max(residuals) / max(float(theta.abs().max()), 1e-300)
        warnings.warn(
            f"eigsh: not converged after {basis.products} products; worst residual {worst:.1e} of |lambda|_max, asked for {tol:.1e}",
            RuntimeWarning,
            stacklevel=2,
        )
    vectors = basis.vectors(s, wanted)
    values = theta[wanted].to(A.dtype).to(A.device)
    return EigenPairs(values, vectors, torch.tensor(residuals, dtype=A.dtype), basis.products, converged)


def _select(theta: Tensor, k: int, which: Which) -> list[int]:
    """Indices of the k wanted among ascending Ritz values, in the order in which they are reported."""
    n = len(theta)
    if which == "LA":
        return list(range(n - 1, n - 1 - k, -1))
    if which == "SA":
        return list(range(k))
    if which == "LM":
        return torch.argsort(theta.abs(), descending=True)[:k].tolist()
    top = (k + 1) // 2
    return list(range(n - 1, n - 1 - top, -1)) + list(range(k - top - 1, -1, -1))


class _RitzBasis:
    """Orthonormal rows V, their images W = A V, and the projected matrix, kept up to date together."""

    def __init__(self, A: SymmetricOperator, max_size: int, generator: torch.Generator):
        self.A = A
        self.generator = generator
        self.products = 0
        self.size = 0
        self.V = torch.empty(max_size, A.shape[0], dtype=A.dtype, device=A.device)
        self.W = torch.empty_like(self.V)
        self.T = torch.zeros(max_size, max_size, dtype=torch.float64)

    def random(self) -> Tensor:
        v = torch.randn(self.A.shape[0], generator=self.generator, dtype=torch.float64)
        return v.to(self.A.device, self.A.dtype)

    def start(self, v0: Tensor | None) -> None:
        if v0 is None:
            self.append(self.random())
            self._check_deterministic()
            return
        if v0.shape[0] != self.A.shape[0] or v0.ndim not in (1, 2):
            raise ValueError(f"v0 must be (P,) or (P, m) with P = {self.A.shape[0]}, got {tuple(v0.shape)}")
        columns = v0.detach().to(self.A.device, self.A.dtype).reshape(self.A.shape[0], -1).T
        for column in columns[: len(self.V)]:
            self.append(column)
            if self.size == 1:
                self._check_deterministic()

    def _check_deterministic(self) -> None:
        again = self.A @ self.V[0]
        self.products += 1
        scale = self.W[0].norm()
        if (again - self.W[0]).norm() > 1e3 * torch.finfo(self.A.dtype).eps * scale:
            raise RuntimeError(
                "two products of the same vector differ beyond rounding: the model is not deterministic "
                f"(relative difference {float((again - self.W[0]).norm() / scale):.1e})"
            )

    def append(self, v: Tensor) -> None:
        """Orthonormalise v against the basis (twice is enough; a dependent one becomes random) and multiply."""
        V = self.V[: self.size]
        for _ in range(5):
            before = v.norm()
            for _ in range(2):
                v = v - V.T @ (V @ v)
            after = v.norm()
            if after > 1e-3 * before and after > 0:
                break
            if after > 10 * torch.finfo(v.dtype).eps * before:
                v = v / after
                continue
            v = self.random()
        self.V[self.size] = v / v.norm()
        w = self.A @ self.V[self.size]
        self.products += 1
        if not torch.isfinite(w).all():
            raise RuntimeError(
                f"product {self.products} with the operator is not finite: check the loss for NaN or overflow"
            )
        self.W[self.size] = w
        self.size += 1
        column = (self.V[: self.size] @ w).double().cpu()
        self.T[: self.size, self.size - 1] = column
        self.T[self.size - 1, : self.size] = column

    def ritz(self) -> tuple[Tensor, Tensor]:
        theta, s = torch.linalg.eigh(self.T[: self.size, : self.size])
        return theta, s

    def _combine(self, rows: Tensor, s: Tensor) -> Tensor:
        return s.T.to(rows.device, rows.dtype) @ rows[: self.size]

    def residual_norms(self, theta: Tensor, s: Tensor, wanted: Sequence[int]) -> list[float]:
        values = theta[wanted].to(self.V.device, self.V.dtype)[:, None]
        r = self._combine(self.W, s[:, wanted]) - values * self._combine(self.V, s[:, wanted])
        return r.norm(dim=1).tolist()

    def expand(self, theta: Tensor, s: Tensor, index: int | None) -> None:
        if index is None:
            self.append(self.random())
            return
        column = s[:, index : index + 1]
        self.append((self._combine(self.W, column) - float(theta[index]) * self._combine(self.V, column))[0])

    def restart(self, s: Tensor, keep: list[int]) -> None:
        V, W = self._combine(self.V, s[:, keep]), self._combine(self.W, s[:, keep])
        self.size = len(keep)
        self.V[: self.size], self.W[: self.size] = V, W
        T = (V @ W.T).double().cpu()
        self.T[: self.size, : self.size] = (T + T.T) / 2

    def vectors(self, s: Tensor, wanted: Sequence[int]) -> Tensor:
        u = self._combine(self.V, s[:, wanted])
        return (u / u.norm(dim=1, keepdim=True)).T.contiguous()
