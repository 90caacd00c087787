"""Measures of paper B along training: where the gradient lies, and how the top subspace moves.

Pure functions from a run's checkpoints to tidy tables. Loss, gradient and Hessian are those of the first ``examples``
training examples (the data set is a seeded draw, so this is a fixed random part of it; null: all of them), in
microbatches of ``batch``; BatchNorm as the column ``batch_norm`` says, dropout off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from curvspace import Objective, class_gradients
from curvspace.curvature import EigenPairs, SubspaceTracker
from curvspace.datasets import DataSet, Split
from curvspace.functional import trainable_parameters
from curvspace.inner import inner, norm
from curvspace.subspace import gradient_fraction, hessian_gradient_overlap, subspace_overlap
from papers.common.runs import tidy

if TYPE_CHECKING:
    from curvspace.curvature.frozen import BatchNorm
    from curvspace.training.record import RunRecord
    from papers.common.context import Context

Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]


def batches_of(data: DataSet, split: Split, examples: int | None, batch: int) -> Batches:
    """The first ``examples`` of a split (null, or more than there are: all), normalised, at most ``batch`` a part."""
    return data.batches(split.take(min(len(split), examples or len(split))), batch)


def trajectory(
    context: Context,
    *,
    examples: int | None,
    batch: int = 1000,
    k: int = 20,
    starts: Sequence[int] = (),
    dimensions: Sequence[int] = (),
    steps: Sequence[int] | None = None,
    tol: float = 1e-3,
    batch_norm: BatchNorm = "batch",
    seed: int = 0,
) -> pd.DataFrame:
    """The top ``k`` eigenpairs of one run at some ``steps`` (null: all checkpoints), and what follows from them.

    Columns: identity, ``parameters``, ``examples``, ``batch_norm``, ``step``, ``quantity``, ``index``, ``start_step``,
    ``value``, ``null`` (expected of a random subspace), ``random`` (measured on one, drawn anew at each step).
    Quantities, with C the number of classes:

    - ``loss``, ``accuracy``, ``products`` (Hessian products that the warm-started tracker took);
    - ``eigenvalue``, ``residual``, ``c2`` (eq. 12) of eigenvector ``index``, counted from 1;
    - ``f_top`` (eq. 2), ``f_next``: share of the gradient in the eigenvectors 1..C, C+1..2C;
    - ``f_class``: share in the span of the class gradients (paper A), ``class_overlap``: overlap of that span with
      the top C eigenvectors (eq. 5);
    - ``hg_overlap``: eq. 3, ``random`` for a random vector of the whole space; ``vertex_overlap``: eq. 4 with the
      measured eigenvalues, which a random vertex of the top subspace would give;
    - ``top_overlap``: eq. 5 between the top-``index`` subspaces at ``start_step`` and ``step``, for each of
      ``starts`` and ``dimensions`` (C always); ``next_overlap``: the same for the next C eigenvectors.
    """
    (run,) = context.runs
    data = context.dataset(run)
    batches = batches_of(data, data.train, examples, batch)
    tracker = SubspaceTracker(k, "LA", tol)
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, Tensor] = {}
    rows: list[Row] = []
    classes = data.num_classes
    for step in context.progress(_reached(run, steps), "top subspace"):
        model = context.model(run, step)
        objective = Objective(model, batches, run.spec["task"]["loss"], batch_norm=batch_norm)
        g, hessian = objective.gradient(), objective.hessian()
        pairs = tracker.update(hessian)
        if step in starts:
            kept[step] = pairs.vectors
        found = [
            *_progress(objective, batches, pairs),
            *_eigenpairs(pairs, g),
            *_gradient_shares(g, hessian, pairs, classes, generator),
            *_class_span(model, batches, g, pairs, classes, generator, batch_norm),
            *_overlaps(kept, step, pairs.vectors, classes, dimensions),
        ]
        rows += [{"step": step, **row} for row in found]
    return tidy(run, rows, parameters=len(g), examples=sum(len(y) for _, y in batches), batch_norm=batch_norm)


def _reached(run: RunRecord, steps: Sequence[int] | None) -> list[int]:
    """The steps asked for, as far as the run went (one that diverged ended early); null: all its checkpoints."""
    return run.steps if steps is None else [step for step in steps if step <= run.steps[-1]]


def _progress(objective: Objective, batches: Batches, pairs: EigenPairs) -> Iterator[Row]:
    yield {"quantity": "loss", "index": 0, "value": objective.loss()}
    model = objective.function  # as the loss is measured: by the same statistics of batch normalisation
    with torch.no_grad():
        outputs = ((model(model.parameters(), model.constants(), x), y) for x, y in batches)
        correct = sum(int((z.argmax(1) == y).sum()) for z, y in outputs)
    yield {"quantity": "accuracy", "index": 0, "value": correct / sum(len(y) for _, y in batches)}
    yield {"quantity": "products", "index": 0, "value": pairs.products}


def _eigenpairs(pairs: EigenPairs, g: Tensor) -> Iterator[Row]:
    shares = (inner(pairs.vectors, g) / norm(g)).square()
    for i, (value, residual, share) in enumerate(zip(pairs.values, pairs.residuals, shares, strict=True), start=1):
        yield {"quantity": "eigenvalue", "index": i, "value": float(value)}
        yield {"quantity": "residual", "index": i, "value": float(residual)}
        yield {"quantity": "c2", "index": i, "value": float(share), "null": 1 / len(g)}


def random_subspace(size: int, dimension: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Orthonormal columns (size, dimension) that span a uniformly random subspace."""
    return torch.linalg.qr(torch.randn(size, dimension, generator=generator).to(like))[0]


def _gradient_shares(g: Tensor, hessian: Any, pairs: EigenPairs, k: int, generator: torch.Generator) -> Iterator[Row]:
    size = len(g)
    random = random_subspace(size, k, generator, g)
    null = {"null": k / size, "random": float(gradient_fraction(g, random))}
    yield {"quantity": "f_top", "index": k, "value": float(gradient_fraction(g, pairs.vectors[:, :k])), **null}
    if pairs.vectors.shape[1] >= 2 * k:
        share = gradient_fraction(g, pairs.vectors[:, k : 2 * k])
        yield {"quantity": "f_next", "index": k, "value": float(share), **null}
    w = random[:, 0]
    overlaps = [float(hessian_gradient_overlap(v, hessian @ v)) for v in (g, w)]
    yield {"quantity": "hg_overlap", "index": 0, "value": overlaps[0], "random": overlaps[1]}
    top = pairs.values[:k].double()
    yield {"quantity": "vertex_overlap", "index": k, "value": float(top.sum() / (k * top.square().sum()).sqrt())}


def _class_span(
    model: nn.Module,
    batches: Batches,
    g: Tensor,
    pairs: EigenPairs,
    k: int,
    generator: torch.Generator,
    batch_norm: BatchNorm,
) -> Iterator[Row]:
    """The gradient and the top eigenvectors against the span of paper A's class gradients."""
    total = torch.zeros(k, len(g), dtype=g.dtype, device=g.device)
    for x, y in batches:
        means, counts = class_gradients(model, x, y, num_classes=k, batch_norm=batch_norm)
        total += means * counts[:, None]
    span = torch.linalg.qr(total[total.norm(dim=1) > 0].T)[0]
    random = random_subspace(len(g), k, generator, g)
    null = k / len(g)
    shares = [float(gradient_fraction(g, q)) for q in (span, random)]
    yield {"quantity": "f_class", "index": k, "value": shares[0], "null": null, "random": shares[1]}
    overlaps = [float(subspace_overlap(q, pairs.vectors[:, :k])) for q in (span, random)]
    yield {"quantity": "class_overlap", "index": k, "value": overlaps[0], "null": null, "random": overlaps[1]}


def _overlaps(kept: dict[int, Tensor], step: int, vectors: Tensor, k: int, dimensions: Sequence[int]) -> Iterator[Row]:
    """Eq. 5 against the earlier subspaces; the Gram matrix of two bases holds it for every dimension.

    With orthonormal columns V, W, Tr(P_V P_W)/d is the squared Frobenius norm of the first d rows and columns of
    VᵀW over d, and that of the next k is its second diagonal block's.
    """
    size, count = vectors.shape
    for start, earlier in kept.items():
        if start == step:
            continue
        squares = inner(earlier, vectors).double().square()
        for d in sorted({*dimensions, k} & set(range(1, count + 1))):
            value = float(squares[:d, :d].sum()) / d
            yield {"quantity": "top_overlap", "index": d, "start_step": start, "value": value, "null": d / size}
        if count >= 2 * k:
            value = float(squares[k : 2 * k, k : 2 * k].sum()) / k
            yield {"quantity": "next_overlap", "index": k, "start_step": start, "value": value, "null": k / size}


def overlaps(
    context: Context,
    *,
    examples: int | None,
    last: int | None,
    batch: int = 1000,
    splits: Sequence[str] = ("train",),
    batch_norm: BatchNorm = "batch",
    seed: int = 0,
) -> pd.DataFrame:
    """Eq. 3 at the checkpoints of the last ``last`` steps of one run (table 1), on training and other examples.

    Columns: identity, ``parameters``, ``examples``, ``batch_norm``, ``step``, ``epoch`` (so many, with the fraction),
    ``split``, ``loss``, ``hg_overlap``, ``random`` (the same for a random vector). ``last`` null: all checkpoints.
    """
    (run,) = context.runs
    data = context.dataset(run)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    window = [s for s in run.steps if last is None or s > run.steps[-1] - last]
    epoch = -(-len(data.train) // run.spec["batch_size"])  # steps: the last minibatch of an epoch may be smaller
    for step in context.progress(window, "gradient and Hessian-gradient product"):
        model = context.model(run, step)
        for split in splits:
            batches = batches_of(data, getattr(data, split), examples, batch)
            objective = Objective(model, batches, run.spec["task"]["loss"], batch_norm=batch_norm)
            hessian, g = objective.hessian(), objective.gradient()
            w = torch.randn(len(g), generator=generator).to(g)
            found = {
                "loss": objective.loss(),
                "hg_overlap": float(hessian_gradient_overlap(g, hessian @ g)),
                "random": float(hessian_gradient_overlap(w, hessian @ w)),
                "parameters": len(g),
                "examples": sum(len(y) for _, y in batches),
            }
            rows.append({"step": step, "epoch": step / epoch, "split": split, **found})
    return tidy(run, rows, batch_norm=batch_norm)


def eigenvectors(
    context: Context,
    *,
    examples: int | None,
    steps: Sequence[int],
    batch: int = 1000,
    thin: int = 1,
    tol: float = 1e-3,
    batch_norm: BatchNorm = "batch",
) -> pd.DataFrame:
    """Entries of the top eigenvector of one run at the given steps, by parameter tensor (figures 6 and 7).

    Columns: identity, ``parameters``, ``examples``, ``batch_norm``, ``step``, ``eigenvalue``, ``tensor`` (the
    parameter's name), ``tensor_rank`` (its place among them), ``layer`` (from 1), ``part`` ("weight", "bias"),
    ``entry`` (place in the flat parameter vector), ``value``. Of tensors with more than ``1000 * thin`` entries each
    ``thin``-th is listed; ``tensor_norm`` and ``tensor_size`` are those of all entries. The sign is such that the
    largest entry is positive.
    """
    (run,) = context.runs
    data = context.dataset(run)
    batches = batches_of(data, data.train, examples, batch)
    tracker = SubspaceTracker(1, "LA", tol)
    tables: list[pd.DataFrame] = []
    for step in context.progress(_reached(run, steps), "top eigenvector"):
        model = context.model(run, step)
        pairs = tracker.update(Objective(model, batches, run.spec["task"]["loss"], batch_norm=batch_norm).hessian())
        v = pairs.vectors[:, 0].cpu()
        v = v * v[v.abs().argmax()].sign()
        measured = {"parameters": len(v), "examples": sum(len(y) for _, y in batches), "batch_norm": batch_norm}
        constants = {**run.identity, **measured, "step": step, "eigenvalue": float(pairs.values[0])}
        tables += [table.assign(**constants) for table in _entries(model, v, thin)]
    return pd.concat(tables, ignore_index=True)


def _entries(model: nn.Module, v: Tensor, thin: int) -> Iterator[pd.DataFrame]:
    parameters = trainable_parameters(model)
    layers = {name: i for i, name in enumerate(dict.fromkeys(n.rpartition(".")[0] for n in parameters), start=1)}
    offset = 0
    for rank, (name, parameter) in enumerate(parameters.items()):
        owner, _, part = name.rpartition(".")
        values = v[offset : offset + parameter.numel()]
        stride = thin if len(values) > 1000 * thin else 1
        entries = torch.arange(0, len(values), stride)
        yield pd.DataFrame(
            {
                "tensor": name,
                "tensor_rank": rank,
                "layer": layers[owner],
                "part": part,
                "tensor_size": len(values),
                "tensor_norm": float(values.norm()),
                "entry": (entries + offset).numpy(),
                "value": values[entries].numpy(),
            }
        )
        offset += parameter.numel()
