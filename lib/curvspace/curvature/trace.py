r"""The trace of an operator from few products (Hutch++: Meyer, Musco, Musco and Woodruff, 2021).

.. math:: \mathrm{Tr}A = \mathrm{Tr}(Q^\top A Q) + \mathrm{Tr}\big((I-QQ^\top)A(I-QQ^\top)\big),

the first term exact with Q spanning A S for a random S (it takes up the few large eigenvalues), the second by
Hutchinson's estimator on what remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from curvspace.arithmetic import in_own_arithmetic
from curvspace.curvature.krylov import SymmetricOperator, plain_operator
from curvspace.inner import inner
from curvspace.subspace import orthonormal_basis


@dataclass(frozen=True)
class TraceEstimate:
    """``value``, its ``standard_error`` over the random probes of the remainder, and the ``products`` spent."""

    value: float
    standard_error: float
    products: int


@in_own_arithmetic
def hutchpp(A: SymmetricOperator, products: int = 60, seed: int = 0) -> TraceEstimate:
    """Estimate Tr A with at most this many matrix-vector products (exactly, once 2/3 of them reach P).

    Raises
    ------
    ValueError
        For fewer than 6 products.
    RuntimeError
        If a product is not finite.
    """
    A = plain_operator(A, "hutchpp")
    if not (isinstance(products, Integral) and products >= 6):
        raise ValueError(f"hutchpp needs a whole number of at least 6 products, got {products!r}")
    n, dtype = A.shape[0], torch.promote_types(A.dtype, torch.float32)
    k = min(products // 3, n)
    generator = torch.Generator().manual_seed(seed)

    def signs(m: int) -> Tensor:
        draw = torch.randint(0, 2, (n, m), generator=generator, device="cpu") * 2 - 1
        return draw.to(A.device, dtype)

    def times(v: Tensor) -> Tensor:
        product = (A @ v.to(A.dtype)).to(dtype)
        if not product.isfinite().all():
            raise RuntimeError("a product with the operator is not finite: NaN or overflow in the model")
        return product

    q = orthonormal_basis(torch.linalg.qr(times(signs(k)))[0])
    exact = float((q * times(q)).double().sum())
    if k == n:
        return TraceEstimate(exact, 0.0, 2 * k)
    m = products - 2 * k
    g = signs(m)
    g = g - q @ inner(q, g)
    samples = (g * times(g)).double().sum(0)
    return TraceEstimate(exact + float(samples.mean()), float(samples.std() / m**0.5), 2 * k + m)
