"""What decides between the explanations: where the mean directions lie, and what is left when the rate goes to zero.

Pure functions from the checkpoints of runs at a constant rate to tidy tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from curvspace import Objective, class_gradients, eigsh
from curvspace.datasets import DataSet
from curvspace.functional import trainable_parameters
from curvspace.optim.base import ModelOptimizer
from curvspace.optim.mean_directions import MeanSpan, mean_span
from curvspace.seeds import seed_generators
from curvspace.subspace import gradient_fraction, orthonormal_basis
from curvspace.training.loop import evaluate, minibatches
from curvspace.training.run import build_optimizer
from curvspace.training.spec import RunSpec

if TYPE_CHECKING:
    from curvspace.training.record import RunRecord
    from papers.common.context import Context

Row = dict[str, Any]


def mean_shares(context: Context, examples: int, k: int, tol: float = 0.01) -> pd.DataFrame:
    r"""M6: how much of the gradient and of the sharp spans lies in the units' mean directions, at each checkpoint.

    With M the span of the mean directions, of size m, the share of a span with orthonormal basis Q (P, k) is
    :math:`\mathrm{Tr}(P_M P_Q)/k`; that of a vector g is :math:`|P_M g|^2/|g|^2`. A random span has m/P, the column
    ``null``. Quantities: the gradient; the class gradients; the top k eigenvectors of the Hessian and of the
    Gauss-Newton matrix; the gradient's share in the class gradients, before and after the means are taken out of both.
    """
    rows: list[Row] = []
    for run in context.runs:
        data = context.dataset(run)
        batch = data.normalise(data.train.inputs[:examples]), data.train.targets[:examples]
        for step in context.progress(run.steps, f"mean directions of {run.identity['model']}"):
            model = context.model(run, step)
            for row in _shares(model, batch, data.num_classes, k, tol, run.spec["task"]["loss"]):
                rows.append({**run.identity, "step": step, "examples": examples, "k": k, **row})
    return pd.DataFrame(rows)


def _shares(
    model: nn.Module, batch: tuple[Tensor, Tensor], classes: int, k: int, tol: float, loss: str
) -> Iterator[Row]:
    shapes = [list(p.shape) for p in trainable_parameters(model).values()]
    means = mean_span(shapes)
    objective = Objective(model, [batch], loss, batch_norm="running")
    g = objective.gradient()
    c, counts = class_gradients(model, *batch, num_classes=classes, batch_norm="running")
    span = orthonormal_basis(c[counts > 0].T)
    rest, free = means.reject(g), orthonormal_basis(means.reject(c[counts > 0]).T)
    null = means.size / len(g)
    spans = {
        "class gradients": span,
        "top of H": eigsh(objective.hessian(), k=k, tol=tol, v0=span).vectors,
        "top of G": eigsh(objective.gauss_newton(), k=k, tol=tol, v0=span).vectors,
    }
    yield {"quantity": "gradient", "value": share(means, g[:, None]), "null": null}
    for name, vectors in spans.items():
        yield {"quantity": name, "value": share(means, vectors), "null": null}
    inside = span.shape[1] / len(g)
    yield {"quantity": "gradient in class gradients", "value": gradient_fraction(g, span), "null": inside}
    yield {
        "quantity": "centred gradient in centred class gradients",
        "value": gradient_fraction(rest, free),
        "null": inside,
    }


def share(means: MeanSpan, vectors: Tensor) -> float:
    r""":math:`\sum_i |M^\top v_i|^2 / \sum_i |v_i|^2` for the columns of vectors (P, k)."""
    inside = sum(float(means.coordinates(v).square().sum()) for v in vectors.T)
    return inside / float(vectors.square().sum())


def annealed(context: Context, steps: int) -> pd.DataFrame:
    """M1: validation loss at each checkpoint, and after ``steps`` more steps over which the rate falls to zero.

    The branch goes on with the run's optimiser, its state and its data. What two optimisers' losses differ by after
    the branch is progress; what is gone was oscillation, which a smaller rate ends.
    """
    rows: list[Row] = []
    for run in context.runs:
        for step in context.progress(run.steps, f"{run.identity['optimizer']}, rate to zero"):
            rows.append({**run.identity, "step": step, "branch_steps": steps, **_branch(context, run, step, steps)})
    return pd.DataFrame(rows)


def _branch(context: Context, run: RunRecord, step: int, steps: int) -> Row:
    at = resumed(context, run, step)
    spec = at.spec

    def losses() -> tuple[float, float, float]:
        with at.optimizer.evaluated():
            validation, accuracy = evaluate(at.model, at.data, at.data.validation, at.optimizer.loss)
            train, _ = evaluate(at.model, at.data, at.data.train, at.optimizer.loss, spec.task.evaluate_train)
        at.model.train()
        return validation, accuracy, train

    before = losses()
    for i in range(steps):
        for group in at.optimizer.param_groups:
            group["lr"] = spec.lr * (1 - (i + 1) / (steps + 1))
        at.step(i)
    names = ("val_loss", "val_accuracy", "train_loss")
    annealed = {f"annealed_{name}": value for name, value in zip(names, losses(), strict=True)}
    return {**dict(zip(names, before, strict=True)), **annealed}


@dataclass
class Resumed:
    """A run as it was at a checkpoint, its optimiser's state and the order of its minibatches included."""

    spec: RunSpec
    data: DataSet
    model: nn.Module
    optimizer: ModelOptimizer
    start: int
    batches: Iterator[tuple[Tensor, Tensor]]

    def step(self, i: int) -> tuple[Tensor, Tensor]:
        """The run's step ``start + i``; gives the minibatch it was taken on."""
        batch = next(self.batches)
        seed_generators(self.start + i, self.data.train.targets.device)
        self.optimizer.step(*batch)
        return batch


def resumed(context: Context, run: RunRecord, step: int) -> Resumed:
    """The run as it went on after ``step`` steps, in training mode."""
    data = context.dataset(run)
    spec = RunSpec.from_dict(run.spec).resolved(len(data.train))
    saved = run.checkpoint(step, context.device)
    model = run.build_model(data).to(context.device)
    optimizer = build_optimizer(spec, model, data.num_classes)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    model.train()
    batches = minibatches(data, spec.task, int(spec.batch_size), spec.seed, step)
    return Resumed(spec, data, model, optimizer, step, batches)
