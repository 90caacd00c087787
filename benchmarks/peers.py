"""Extreme eigenpairs of the Hessian by each library's own recommended call. Missing libraries are left out.

ViViT 1.0.0 installs but does not run on torch 2.11 and later: it calls ``torch.symeig``, which was removed.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective, eigsh


@dataclass(frozen=True)
class Found:
    """Eigenvalues (k,), eigenvectors (P, k), products spent, and the setting that was needed."""

    values: Tensor
    vectors: Tensor
    products: int
    note: str = ""
    share: float = float("nan")
    """Of the time of the solve that is not spent in products (ours and ARPACK on our products)."""


Solver = Callable[[nn.Module, Tensor, Tensor, int, str, float], Found]


def ours(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float) -> Found:
    H = TimedOperator(Objective(model, [(x, y)]).hessian())
    start = time.process_time()
    pairs = eigsh(H, k, which, tol)  # type: ignore[arg-type]
    share = 1 - H.seconds / (time.process_time() - start)
    return Found(pairs.values, pairs.vectors, pairs.products, share=share)


def arpack_on_ours(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float) -> Found:
    """SciPy's ARPACK with the products of this package: the eigensolvers alone compared."""
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh as arpack

    H = TimedOperator(Objective(model, [(x, y)]).hessian())
    start = time.process_time()
    operator = LinearOperator(H.shape, matvec=lambda v: (H @ torch.from_numpy(v)).cpu().numpy(), dtype="float32")
    values, vectors = arpack(operator, k=k, which=which, tol=tol)
    share = 1 - H.seconds / (time.process_time() - start)
    return Found(torch.from_numpy(values).to(x), torch.from_numpy(vectors).to(x), H.operator.products, share=share)


class TimedOperator:
    """An operator whose products' processor seconds are added up: what remains of a solve is the solver's own."""

    deterministic = True

    def __init__(self, operator: Any):
        self.operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.seconds = 0.0

    def __matmul__(self, v: Tensor) -> Tensor:
        start = time.process_time()
        result = self.operator @ v
        self.seconds += time.process_time() - start
        return result


def curvlinops(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float) -> Found:
    """curvlinops' Hessian in SciPy's ARPACK, as its documentation shows."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh as arpack

    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)]).to_scipy()
    products = 0

    def count(v: object) -> object:
        nonlocal products
        products += 1
        return operator @ v

    counting = LinearOperator(operator.shape, matvec=count, dtype=operator.dtype)
    values, vectors = arpack(counting, k=k, which=which, tol=tol)
    return Found(torch.from_numpy(values).to(x), torch.from_numpy(vectors).to(x), products)


def hessian_eigenthings(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float) -> Found:
    """Lanczos with the number of steps that its user must choose: the fewest, in tens, for which its pairs converge.

    Only the run that converges is timed: see :func:`steps_to_converge`.
    """
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(model, [(x, y)], supervised_loss(F.cross_entropy))
    steps = _steps[id(model), k, which]
    found = lanczos(operator, k=k, which=which, tol=tol, max_iter=steps, reorthogonalize=True, seed=0)
    return Found(found.eigenvalues, found.eigenvectors.T, steps, f"{steps} steps")


_steps: dict[tuple[int, int, str], int] = {}


def steps_to_converge(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float, most: int = 200) -> None:
    """Find the number of steps for :func:`hessian_eigenthings`: its own Lanczos, on our Hessian to save time.

    One long run serves: after m steps its criterion is |beta_m s_mi| < tol |lambda_i|, from the first m coefficients.
    """
    from hessian_eigenthings import LambdaOperator, lanczos_tridiagonal

    H = Objective(model, [(x, y)]).hessian()
    operator = LambdaOperator(lambda v: H @ v, size=H.shape[0], dtype=H.dtype, device=H.device)
    start = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0)).to(x)
    run = lanczos_tridiagonal(operator, start, most, reorthogonalize=True)
    alphas, betas = run.alphas.double().cpu(), run.betas.double().cpu()
    steps = most
    for m in range(10 * math.ceil(2 * k / 10), most, 10):
        tridiagonal = torch.diag(alphas[:m]) + torch.diag(betas[: m - 1], 1) + torch.diag(betas[: m - 1], -1)
        values, s = torch.linalg.eigh(tridiagonal)
        wanted = slice(m - k, m) if which == "LA" else slice(0, k)
        if (betas[m - 1] * s[-1, wanted].abs() < tol * values[wanted].abs()).all():
            steps = m
            break
    _steps[id(model), k, which] = steps


def pyhessian(model: nn.Module, x: Tensor, y: Tensor, k: int, which: str, tol: float) -> Found:
    """Power iteration with deflation: eigenvalues of largest magnitude."""
    from pyhessian import hessian

    module = sys.modules["pyhessian.hessian"]
    with mock.patch.object(module, "hessian_vector_product", wraps=module.hessian_vector_product) as product:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backward(create_graph=True)
            values, vectors = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=x.is_cuda).eigenvalues(
                maxIter=100, tol=tol, top_n=k
            )
        count = product.call_count
    model.zero_grad(set_to_none=True)
    flat = torch.stack([torch.cat([p.reshape(-1) for p in v]) for v in vectors], dim=1).detach()
    return Found(torch.tensor(values).to(x), flat, count)


def available() -> dict[str, Solver]:
    """Ours first, then the libraries that are installed."""
    peers = {"curvlinops": curvlinops, "hessian_eigenthings": hessian_eigenthings, "pyhessian": pyhessian}
    own = {"curvspace": ours, "ARPACK on our products": arpack_on_ours}
    return {**own, **{name: f for name, f in peers.items() if importlib.util.find_spec(name)}}
