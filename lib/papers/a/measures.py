"""Measures of paper A: where the class gradients lie in the spectrum, and what eq. 12 makes of it.

Pure functions from a run's checkpoints to tidy tables. All act on a fixed part of the training set (its first
``examples``; the size is a column), with BatchNorm as the column ``batch_norm`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from curvspace import Objective, class_gradients, eigsh
from curvspace.curvature import EigenPairs, SubspaceTracker, hutchpp
from curvspace.curvature.class_gradients import class_curvatures
from curvspace.curvature.frozen import BatchNorm
from curvspace.datasets import DataSet
from curvspace.errors import UserError
from curvspace.inner import inner, norm
from curvspace.inputs import call
from curvspace.subspace import cosine_assignment, gradient_fraction, orthonormal_basis, principal_angles, union_rank
from papers.common.runs import tidy

if TYPE_CHECKING:
    from curvspace.training.record import RunRecord
    from papers.common.context import Context

Row = dict[str, Any]


def training_batch(data: DataSet, examples: int) -> tuple[Tensor, Tensor]:
    """The first ``examples`` training examples: the minibatch on which curvature is measured."""
    return data.normalise(data.train.inputs[:examples]), data.train.targets[:examples]


def unit_rows(vectors: Tensor) -> Tensor:
    """v_k = c_k/|c_k| as columns (P, C'), classes without examples left out (paper A, eq. 10-11)."""
    norms = norm(vectors.T)
    return (vectors[norms > 0] / norms[norms > 0, None]).T


def eq12_eigenvalues(model: nn.Module, x: Tensor, y: Tensor, gradients: Tensor) -> Tensor:
    """Paper A's eq. 12 for class gradients (C, P) of the batch, with the model's own probabilities, (C,)."""
    with torch.no_grad():
        own = call(model, x).softmax(1).gather(1, y[:, None]).squeeze(1)
    return class_curvatures(gradients, own, y)


def _run_of(context: Context) -> RunRecord:
    """The one run of a measure; eq. 12 and the class gradients are those of the cross-entropy."""
    (run,) = context.runs
    if (loss := run.spec["task"]["loss"]) != "cross_entropy":
        name = f"{run.identity['dataset']}/{run.identity['model']}"
        raise UserError(f"paper A's measures need the loss cross_entropy; tasks.{name}.loss is {loss!r}")
    return run


def spectrum(context: Context, k: int, examples: int, tol: float = 1e-3) -> pd.DataFrame:
    """A-F3: the k largest eigenvalues of the Hessian at the end of training.

    Columns: identity, step, examples, batch_norm, index (1 is the largest), eigenvalue, residual, converged.
    """
    run = _run_of(context)
    data = context.dataset(run)
    model = context.model(run, run.steps[-1])
    pairs = top_pairs(model, training_batch(data, examples), k, tol)
    rows = [
        {
            "step": run.steps[-1],
            "examples": examples,
            "batch_norm": "running",
            "classes": data.num_classes,
            "index": i + 1,
        }
        | {"eigenvalue": float(value), "residual": float(residual), "converged": pairs.converged}
        for i, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True))
    ]
    return tidy(run, rows)


def top_pairs(model: nn.Module, batch: tuple[Tensor, Tensor], k: int, tol: float) -> EigenPairs:
    """Top-k eigenpairs of the Hessian, the search started in the span of the class gradients."""
    objective = Objective(model, [batch], batch_norm="running")
    classes = int(batch[1].max()) + 1
    start, _ = class_gradients(model, *batch, num_classes=classes)
    return eigsh(objective.hessian(), k=k, tol=tol, v0=unit_rows(start))


def span_along_training(
    context: Context, minibatch: int, examples: int, tolerances: Sequence[float], tol: float = 1e-3
) -> pd.DataFrame:
    """A-F4a: the rank of [v_1..v_C, e_0..e_C] along training (eq. 18), for several tolerances.

    e are the top C + 1 eigenvectors of the fully trained network; v the class gradients of one minibatch at each
    checkpoint. ``rank`` counts singular values above ``tolerance`` times the largest. The whole profile is there
    with ``quantity`` "singular value". ``null`` is the rank of the same e with C random unit vectors.
    """
    run = _run_of(context)
    data = context.dataset(run)
    final = context.model(run, run.steps[-1])
    eigenvectors = top_pairs(final, training_batch(data, examples), data.num_classes + 1, tol).vectors
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for step in context.progress(run.steps, "rank of the union"):
        batch = _minibatch(data, minibatch, step)
        gradients, _ = class_gradients(context.model(run, step), *batch, num_classes=data.num_classes)
        v = unit_rows(gradients)
        random = torch.randn(v.shape, generator=generator).to(v)
        for tolerance in tolerances:
            rank, profile = union_rank(v, eigenvectors, tolerance)
            null, _ = union_rank(random, eigenvectors, tolerance)
            rows.append({"step": step, "quantity": "rank", "tolerance": tolerance, "value": rank, "null": null})
        rows += [
            {"step": step, "quantity": "singular value", "index": i + 1, "value": float(s)}
            for i, s in enumerate(profile)
        ]
    return tidy(
        run, [row | {"minibatch": minibatch, "examples": examples, "classes": data.num_classes} for row in rows]
    )


def cosines(context: Context, examples: int, tol: float = 1e-3) -> pd.DataFrame:
    """A-F4b: |cos| between class gradients and the top-C eigenvectors after training, and the best assignment.

    One row a pair (class, eigenvector index from 1); ``assigned`` marks the pairs of the assignment that maximises
    the sum; ``mean_cosine`` and ``null`` (random vectors of the same shape) are its means.
    """
    run = _run_of(context)
    data = context.dataset(run)
    batch = training_batch(data, examples)
    model = context.model(run, run.steps[-1])
    gradients, counts = class_gradients(model, *batch, num_classes=data.num_classes)
    present = [k for k in range(data.num_classes) if counts[k] > 0]
    v = unit_rows(gradients)
    found = cosine_assignment(v, top_pairs(model, batch, data.num_classes, tol).vectors, null_samples=20)
    matched = found.columns.tolist()
    rows = [
        {"class": present[i], "index": j + 1, "cosine": float(found.cosines[i, j]), "assigned": matched[i] == j}
        for i in range(found.cosines.shape[0])
        for j in range(found.cosines.shape[1])
    ]
    common = {"step": run.steps[-1], "examples": examples, "mean_cosine": float(found.mean), "null": float(found.null)}
    return tidy(run, [row | common for row in rows])


def diagnosis(
    context: Context,
    examples: int,
    trace_products: int = 30,
    tol: float = 1e-2,
    batch_norm: BatchNorm = "running",
    steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    r"""A-X1: what eq. 12 claims about the class-gradient span, and what holds, at these of the run's checkpoints (all).

    One row a (step, quantity, ``index`` of the class, from 0, or of the pair of those that are there):

    - "ratio": :math:`\lambda_k / v_k^\top G v_k`; "lambda": eq. 12; "curvature": :math:`v_k^\top G v_k`;
    - "newton step": the largest eigenvalue of :math:`\Lambda^{-1/2} V^\top G V \Lambda^{-1/2}`, by which the step
      :math:`V \Lambda^{-1} V^\top g` overshoots along the worst direction of the span; 1 where eq. 11 is exact. On a
      quadratic the step is stable below :math:`2(1+\mu)` under the heavy ball and below :math:`2(1+\mu)/(1-\mu)` under
      a running average: 3.8 and 38 for :math:`\mu=0.9`;
    - "cosine": :math:`v_j^\top v_k` for j < k;
    - "share of gradient", "share of trace H", "share of trace G": of |g|², Tr H, Tr G, the part in the span of the
      v_k, with the null k/P of a random span; the traces by Hutch++;
    - "angle to H", "angle to G": principal angles in degrees between the span and the top-C eigenspace.
    """
    run = _run_of(context)
    data = context.dataset(run)
    trackers = {name: SubspaceTracker(data.num_classes, which="LA", tol=tol) for name in ("H", "G")}
    rows: list[Row] = []
    wanted = [step for step in run.steps if steps is None or step in steps]
    for step in context.progress(wanted, "diagnosis"):
        model = context.model(run, step)
        if batch_norm == "batch":
            model.train()
        batch = training_batch(data, examples)
        found = _diagnose(model, batch, data.num_classes, trackers, trace_products, batch_norm)
        rows += [{"step": step, "examples": examples, "batch_norm": batch_norm, **row} for row in found]
    return tidy(run, rows)


def _diagnose(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    classes: int,
    trackers: dict[str, SubspaceTracker],
    trace_products: int,
    batch_norm: BatchNorm,
) -> list[Row]:
    objective = Objective(model, [batch], batch_norm=batch_norm)
    operators = {"H": objective.hessian(), "G": objective.gauss_newton()}
    gradients, _ = class_gradients(model, *batch, num_classes=classes)
    v = unit_rows(gradients)
    present = gradients.norm(dim=1) > 0
    classes_present = present.nonzero().flatten().tolist()
    gv = operators["G"] @ v
    curvature = (v * gv).sum(0)
    lambdas = eq12_eigenvalues(model, *batch, gradients)[present]
    q = orthonormal_basis(v)
    rows: list[Row] = []
    for k, value, along in zip(classes_present, lambdas.tolist(), curvature.tolist(), strict=True):
        rows.append({"quantity": "lambda", "index": k, "value": value})
        rows.append({"quantity": "curvature", "index": k, "value": along})
        rows.append({"quantity": "ratio", "index": k, "value": value / along if along else np.nan})
    scaled = inner(v, gv) / (lambdas[:, None] * lambdas).sqrt()
    if bool((lambdas > 0).all()):
        rows.append({"quantity": "newton step", "value": float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[-1])})
    gram = inner(v, v)
    pairs = torch.triu_indices(len(gram), len(gram), offset=1)
    rows += [
        {"quantity": "cosine", "index": n, "value": value} for n, value in enumerate(gram[pairs[0], pairs[1]].tolist())
    ]
    null = q.shape[1] / q.shape[0]
    share = float(gradient_fraction(objective.gradient(), q))
    rows.append({"quantity": "share of gradient", "value": share, "null": null})
    for name, operator in operators.items():
        inside = float((q * (operator @ q)).sum())
        trace = float(hutchpp(operator, products=trace_products, seed=0).value)
        rows.append({"quantity": f"share of trace {name}", "value": inside / trace, "null": null})
        top = trackers[name].update(operator).vectors
        angles = torch.rad2deg(principal_angles(q, top)).tolist()
        rows += [{"quantity": f"angle to {name}", "index": i, "value": a} for i, a in enumerate(angles)]
    return rows


def _minibatch(data: DataSet, size: int, step: int) -> tuple[Tensor, Tensor]:
    """A minibatch drawn for this step, apart from those of the training itself."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(len(data.train), generator=generator)[:size].to(data.train.targets.device)
    return data.normalise(data.train.inputs[index]), data.train.targets[index]
