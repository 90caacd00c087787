"""Paper B's Hessian spectra: all eigenvalues or their density, the top ones, and how many stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from curvspace import Objective, eigsh, spectral_density
from curvspace.curvature import dense_matrix
from papers.b.measures import batches_of

if TYPE_CHECKING:
    from curvspace.curvature.frozen import BatchNorm
    from curvspace.training.record import RunRecord
    from papers.common.context import Context


def spectrum(
    context: Context,
    *,
    examples: int | None,
    k: int = 30,
    batch: int = 1000,
    dense_up_to: int = 5000,
    probes: int = 4,
    lanczos_steps: int = 80,
    tol: float = 1e-3,
    batch_norm: BatchNorm = "batch",
) -> pd.DataFrame:
    """The Hessian's spectrum at the end of each run (figure 4).

    With at most ``dense_up_to`` parameters the matrix is formed and all eigenvalues are listed (float64); otherwise
    the top ``k`` ones and the density of the whole spectrum by stochastic Lanczos quadrature. Columns:
    identity, ``parameters``, ``examples``, ``batch_norm``, ``classes`` (distinct targets), ``step``, ``accuracy`` (on
    these examples), ``method`` ("dense" or "Lanczos"), ``quantity``, ``index``, ``eigenvalue``, ``value``.
    Quantities: ``eigenvalue`` (``index`` from 1, largest first; ``value`` is its residual), ``density`` (``value``
    per unit of ``eigenvalue``, integrates to 1).
    """
    tables = [
        _one_spectrum(context, run, examples, k, batch, dense_up_to, probes, lanczos_steps, tol, batch_norm)
        for run in context.progress(context.runs, "spectra")
    ]
    return pd.concat(tables, ignore_index=True)


def _one_spectrum(
    context: Context,
    run: RunRecord,
    examples: int | None,
    k: int,
    batch: int,
    dense_up_to: int,
    probes: int,
    lanczos_steps: int,
    tol: float,
    batch_norm: BatchNorm,
) -> pd.DataFrame:
    data, step = context.dataset(run), run.steps[-1]
    model = context.model(run, step)
    batches = batches_of(data, data.train, examples, batch)
    size = sum(p.numel() for p in model.parameters())
    dense = size <= dense_up_to
    dtype = torch.float64 if dense else None
    objective = Objective(model, batches, run.spec["task"]["loss"], batch_norm=batch_norm, dtype=dtype)
    hessian = objective.hessian()
    if dense:
        values = torch.linalg.eigvalsh(dense_matrix(hessian, limit=dense_up_to)).flip(0)
        rows = _listed(values, torch.zeros_like(values))
    else:
        pairs = eigsh(hessian, k=k, tol=tol)
        rows = _listed(pairs.values, pairs.residuals)
        density = spectral_density(hessian, probes=probes, steps=lanczos_steps)
        rows += [
            {"quantity": "density", "index": i, "eigenvalue": float(x), "value": float(y)}
            for i, (x, y) in enumerate(zip(density.grid, density.density, strict=True))
        ]
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    targets = torch.cat([y for _, y in batches])
    constants = {
        **run.identity,
        "parameters": size,
        "examples": len(targets),
        "batch_norm": batch_norm,
        "classes": len(targets.unique()),
        "step": step,
        "accuracy": correct / len(targets),
        "method": "dense" if dense else "Lanczos",
    }
    return pd.DataFrame(rows).assign(**constants)


def _listed(values: torch.Tensor, residuals: torch.Tensor) -> list[dict[str, Any]]:
    return [
        {"quantity": "eigenvalue", "index": i, "eigenvalue": float(value), "value": float(residual)}
        for i, (value, residual) in enumerate(zip(values, residuals, strict=True), start=1)
    ]


def edge(
    context: Context,
    *,
    examples: int | None,
    k: int,
    batch: int = 1000,
    tol: float = 1e-3,
    batch_norm: BatchNorm = "batch",
) -> pd.DataFrame:
    """The top ``k`` eigenvalues at the end of one run (figure 5: one job for each initialisation).

    Columns: identity, ``parameters``, ``examples``, ``classes``, ``step``, ``index``, ``eigenvalue``, ``residual``.
    """
    (run,) = context.runs
    data, step = context.dataset(run), run.steps[-1]
    batches = batches_of(data, data.train, examples, batch)
    loss = run.spec["task"]["loss"]
    hessian = Objective(context.model(run, step), batches, loss, batch_norm=batch_norm).hessian()
    pairs = eigsh(hessian, k=k, tol=tol)
    table = pd.DataFrame(
        {
            "index": range(1, k + 1),
            "eigenvalue": pairs.values.tolist(),
            "residual": pairs.residuals.tolist(),
        }
    )
    constants = {"parameters": hessian.shape[0], "examples": sum(len(y) for _, y in batches), "step": step}
    return table.assign(**run.identity, **constants, classes=data.num_classes)
