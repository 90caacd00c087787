r"""Whole spectra: the matrix itself where P is small, the Gram matrix of G where the outputs are few."""

from __future__ import annotations

import torch
from torch import Tensor

from curvspace.arithmetic import own_arithmetic
from curvspace.curvature.krylov import SymmetricOperator
from curvspace.curvature.linearisation import GaussNewtonLinearisation, OutputCurvature
from curvspace.curvature.operators import GaussNewtonOperator
from curvspace.functional import flatten
from curvspace.threads import one_at_a_time

MAX_DENSE = 5_000
"""Parameters up to which the matrix is formed without being asked twice (5,000 squared in float64: 200 MB)."""


def dense_matrix(A: SymmetricOperator, chunk: int = 64, limit: int = MAX_DENSE) -> Tensor:
    """The matrix (P, P) of an operator, symmetrised, in float64; costs P products.

    Raises
    ------
    ValueError
        If P is above ``limit``: for large P see :func:`~curvspace.curvature.density.spectral_density`.
    """
    n = A.shape[0]
    if n > limit:
        raise ValueError(f"P = {n} is above limit = {limit}; use spectral_density, or raise the limit")
    matrix = torch.empty(n, n, dtype=torch.float64, device="cpu")
    for start in range(0, n, chunk):
        width = min(chunk, n - start)
        columns = torch.zeros(n, width, dtype=A.dtype, device=A.device)
        columns[start : start + width] = torch.eye(width, dtype=A.dtype, device=A.device)
        matrix[:, start : start + width] = (A @ columns).cpu()
    return (matrix + matrix.T) / 2


def dense_eigh(A: SymmetricOperator, limit: int = MAX_DENSE) -> tuple[Tensor, Tensor]:
    """All eigenvalues (P,), ascending, and eigenvectors (P, P), in float64 on the CPU."""
    values, vectors = torch.linalg.eigh(dense_matrix(A, limit=limit))
    return values, vectors


@one_at_a_time
@torch.inference_mode(False)
def gram_eigh(G: GaussNewtonOperator, tol: float = 1e-10) -> tuple[Tensor, Tensor]:
    r"""All non-zero eigenpairs of a Gauss-Newton matrix from its Gram matrix; exact, whatever P is.

    With :math:`\nabla_z^2\ell = S S^\top`, :math:`G = (J^\top S)(J^\top S)^\top` shares its non-zero spectrum with the
    (NC, NC) matrix :math:`(J^\top S)^\top(J^\top S)` (as in ViViT). Costs N C backward passes over one example each and
    N C vectors of length P, so it is for few examples.

    Returns
    -------
    Eigenvalues (r,), largest first, and orthonormal eigenvectors (P, r); values below ``tol`` of the largest
    are left out.

    Raises
    ------
    ValueError
        If the operator is no Gauss-Newton matrix, or the loss is not convex in the outputs, so that G has no real
        factor, or is no sum over the examples.
    """
    if not isinstance(G, GaussNewtonOperator):
        what = getattr(G, "name", type(G).__name__)
        raise ValueError(
            f"gram_eigh needs a Gauss-Newton matrix (objective.gauss_newton()), got: {what}; "
            "take eigsh, or dense_eigh for few parameters"
        )
    if G.group is not None:
        raise ValueError("gram_eigh works within one process: collect the batches first")
    columns = []
    with own_arithmetic(G.device):
        for batch in G.batches:
            linearisation = GaussNewtonLinearisation(G.point, batch)
            for u in _square_root_columns(linearisation.curvature):
                columns.append(flatten(linearisation.jacobian.backward(u)) * batch.weight**0.5)
    if not columns:
        return torch.zeros(0, dtype=G.dtype, device=G.device), torch.zeros(
            G.shape[0], 0, dtype=G.dtype, device=G.device
        )
    factor = torch.stack(columns, dim=1)
    values, small = torch.linalg.eigh(factor.T.double() @ factor.double())
    keep = values > tol * values[-1].clamp_min(0)
    values, small = values[keep].flip(0), small[:, keep].flip(1)
    return values.to(G.dtype), (factor.double() @ small / values.sqrt()).to(G.dtype)


def _square_root_columns(curvature: OutputCurvature) -> list[Tensor]:
    """Columns s of a factor of the loss's Hessian in the outputs, each of z's shape, one per example and direction.

    The loss is a sum of terms of one example each, so a unit vector in the same output of every example probes
    all examples' (C, C) blocks at once. A random vector shows whether it is.
    """
    z = curvature.z.detach()
    if curvature.read or z.ndim < 2:
        raise ValueError(
            "gram_eigh needs outputs (N, ...) in one tensor and a loss of nothing but them and the targets"
        )
    n, c = z.shape[0], z[0].numel()
    blocks = torch.empty(n, c, c, dtype=z.dtype, device=z.device)
    for j in range(c):
        unit = torch.zeros(n, c, dtype=z.dtype, device=z.device)
        unit[:, j] = 1
        blocks[:, :, j] = curvature.product(unit.view_as(z), [])[0].reshape(n, c)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(n, c, generator=generator, dtype=torch.float32, device="cpu").to(z)
    product, of_blocks = curvature.product(probe.view_as(z), [])[0].reshape(n, c), (blocks @ probe[:, :, None])[:, :, 0]
    if (product - of_blocks).norm() > 1e3 * torch.finfo(z.dtype).eps * product.norm():
        raise ValueError(
            "the loss is no sum over the examples: its Gauss-Newton matrix has no Gram matrix of this form"
        )
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    if values.min() < -1e-6 * values.abs().max():
        raise ValueError("the loss is not convex in the outputs: its Gauss-Newton matrix has no Gram matrix")
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]
    columns = []
    for i, j in (values > 1e-12 * values.max()).nonzero().tolist():
        column = torch.zeros(n, c, dtype=z.dtype, device=z.device)
        column[i] = roots[i, :, j]
        columns.append(column.view_as(z))
    return columns
