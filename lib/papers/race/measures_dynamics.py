r"""What single steps do in a span and outside it: measures M2 to M5, from the checkpoints of runs at a constant rate.

A run goes on from each checkpoint for a window of a few dozen steps. Three spans, each with an orthonormal basis Q
that stays as it is through the window: the class gradients at its start, the units' mean directions, and as many
random directions as there are classes. Batch normalisation, if any, uses its stored statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from curvspace import Objective, class_gradients, eigsh
from curvspace.curvature import HessianOperator
from curvspace.errors import UserError
from curvspace.functional import flatten, trainable_parameters, unflatten
from curvspace.optim import registry
from curvspace.optim.first_order import FirstOrder
from curvspace.optim.mean_directions import mean_span
from curvspace.optim.span import Span, identity_span, orthonormal_span
from curvspace.seeds import derived_seed, seed_generators
from curvspace.training.loop import minibatches
from curvspace.training.spec import Block
from papers.race.measures_why import Resumed, Row, resumed

if TYPE_CHECKING:
    from papers.common.context import Context

Batch = tuple[Tensor, Tensor]


def windows(context: Context, starts: Sequence[int], steps: int, examples: int) -> pd.DataFrame:
    r"""M2 to M4: one row per run, checkpoint and span; L is the mean loss of the first ``examples`` of training.

    ``gain``: M2, :math:`L(\theta_T) - L(\theta_T + Q(\bar s - Q^\top\theta_T))` with :math:`\bar s` the window's mean
    of :math:`Q^\top\theta_t`: what the span's oscillation hides; ``gain_whole``: the same for all coordinates.

    ``autocorrelation``: M3, of the coordinates :math:`s_t = Q^\top g_{B_t}` of the steps' minibatch gradients, lag one.
    ``signal``, ``noise``: :math:`|Q^\top\nabla L|^2` and the mean of :math:`|Q^\top(g_B - \nabla L)|^2`, unbiased,
    from a second minibatch at each step: the mean of :math:`s_t^\top s'_t`, and what is left of :math:`|s_t|^2`.

    ``inside``, ``outside``, ``across``: M4, mean change of L by a step d in second order,
    :math:`g^\top d_Q + \tfrac12 d_Q^\top H d_Q`, the same of the rest, :math:`d_Q^\top H d_\perp`; ``change``: in fact.

    ``stability``: M3, :math:`\eta\lambda_1` of H at the checkpoint as a share of the largest rate's at which the run's
    momentum is stable on a quadratic (:func:`stability_limit`).
    """
    rows: list[Row] = []
    for run in context.runs:
        for step in context.progress([s for s in run.steps if s in starts], f"steps of {run.identity['optimizer']}"):
            rows += [
                {**run.identity, "step": step, "window": steps, **row}
                for row in _window(context, run, step, steps, examples)
            ]
    return pd.DataFrame(rows)


def _window(context: Context, run: Any, step: int, steps: int, examples: int) -> list[Row]:
    at = resumed(context, run, step)
    batch = _first(at, examples)
    objective = Objective(at.model, [batch], at.spec.task.loss, batch_norm="running")
    spans = _spans(at.model, batch, at.data.num_classes, step)
    second = minibatches(at.data, at.spec.task, int(at.spec.batch_size), derived_seed(at.spec.seed, "second"), step)
    top = float(eigsh(objective.hessian(), k=1, tol=0.01).values[0])
    path, minibatch_gradients, splits = [_position(at.model)], [], []
    before = objective.loss()
    for i in range(steps):
        gradient, hessian = objective.gradient(), objective.hessian()
        again = _gradient(at, next(second))
        drawn = next(at.batches)
        minibatch_gradients.append((_gradient(at, drawn), again))
        seed_generators(step + i, at.data.train.targets.device)
        at.optimizer.step(*drawn)
        path.append(_position(at.model))
        d = path[-1] - path[-2]
        curved = hessian @ d
        splits.append({name: second_order(span, d, gradient, hessian, curved) for name, span in spans.items()})
    mean, end, loss = torch.stack(path[1:]).mean(0), path[-1], objective.loss()
    limit = stability_limit(at.optimizer.param_groups[0])
    found = []
    for name, span in spans.items():
        coordinates = [[span.coordinates(g) for g in pair] for pair in minibatch_gradients]
        first, other = (torch.stack(list(part)).double() for part in zip(*coordinates, strict=True))
        row = {"span": name, "size": span.size, "loss": loss, "sharpness": top, "stability": at.spec.lr * top / limit}
        row["gain"] = loss - _loss_at(at.model, objective, end + span.combine(span.coordinates(mean - end)), end)
        row["gain_whole"] = loss - _loss_at(at.model, objective, mean, end)
        row |= signal_and_noise(first, other)
        row |= {key: sum(split[name][key] for split in splits) / steps for key in ("inside", "outside", "across")}
        found.append({**row, "change": (loss - before) / steps})
    return found


def second_order(span: Span, d: Tensor, gradient: Tensor, hessian: HessianOperator, curved: Tensor) -> dict[str, float]:
    r"""The change :math:`g^\top d + \tfrac12 d^\top H d` split: in the span, outside, mixed; ``curved``: Hd."""
    inner = span.combine(span.coordinates(d))
    rest = d - inner
    inner_curved = hessian @ inner
    inside = gradient @ inner + inner @ inner_curved / 2
    outside = gradient @ rest + rest @ (curved - inner_curved) / 2
    return {"inside": float(inside), "outside": float(outside), "across": float(rest @ inner_curved)}


def signal_and_noise(first: Tensor, second: Tensor) -> dict[str, float]:
    """From two independent minibatches' coordinates at each step, both (steps, k): see :func:`windows`."""
    signal = float((first * second).sum(1).mean())
    noise = float((first.square() + second.square()).sum(1).mean()) / 2 - signal
    centred = first - first.mean(0)
    spread = float(centred.square().sum())
    follows = float((centred[1:] * centred[:-1]).sum()) * len(first) / max(len(first) - 1, 1)
    return {"autocorrelation": follows / spread if spread else float("nan"), "signal": signal, "noise": noise}


def stability_limit(group: Mapping[str, Any]) -> float:
    r"""The largest :math:`\eta\lambda` at which a param group's momentum is stable on a quadratic.

    :math:`2(1+\beta)` for the heavy ball, :math:`2(1+\beta)/(1+2\beta)` for Nesterov's momentum as torch has it; NaN
    for groups that say nothing of a momentum (Adam).
    """
    if "momentum" not in group or group.get("dampening", 0) != 0:
        return float("nan")
    beta = float(group["momentum"])
    return 2 * (1 + beta) / ((1 + 2 * beta) if group.get("nesterov") else 1)


def switched(
    context: Context, starts: Sequence[int], steps: int, every: int, examples: int, optimizers: Mapping[str, Any]
) -> pd.DataFrame:
    r"""M5: the largest Hessian eigenvalue after a change of the optimiser in mid-run, and without one.

    From each checkpoint the run goes on with each of ``optimizers`` (name -> config block) at its own rate, momentum
    taken along; :math:`\lambda_1` of the loss of the first ``examples`` at every ``every``-th step.
    """
    rows: list[Row] = []
    for run in context.runs:
        for step in context.progress([s for s in run.steps if s in starts], f"switching {run.identity['optimizer']}"):
            for name, block in optimizers.items():
                for row in _switch(context, run, step, steps, every, examples, {"name": name, **block}):
                    rows.append({**run.identity, "step": step, "then": name, **row})
    return pd.DataFrame(rows)


def _switch(
    context: Context, run: Any, step: int, steps: int, every: int, examples: int, block: Mapping[str, Any]
) -> list[Row]:
    at = resumed(context, run, step)
    if block["name"] != run.identity["optimizer"]:
        chosen = Block.of(block)
        other = registry.build(
            chosen.kind, chosen.options, at.model, at.data.num_classes, at.spec.lr, at.spec.task.loss
        )
        if not isinstance(at.optimizer, FirstOrder) or not isinstance(other, FirstOrder):
            raise UserError(f"studies.race.switching: {block['name']} cannot take over another rule's momentum")
        other.inner.state.update(at.optimizer.inner.state)  # of the same parameters; the new rule keeps its own rates
        at.optimizer = other
    objective = Objective(at.model, [_first(at, examples)], at.spec.task.loss, batch_norm="running")
    found = []
    for i in range(steps + 1):
        if i % every == 0:
            top = eigsh(objective.hessian(), k=1, tol=0.01).values[0]
            found.append({"after": i, "sharpness": float(top), "loss": objective.loss()})
        if i < steps:
            at.step(i)
    return found


def _first(at: Resumed, examples: int) -> Batch:
    return at.data.normalise(at.data.train.inputs[:examples]), at.data.train.targets[:examples]


def _spans(model: nn.Module, batch: Batch, classes: int, seed: int) -> dict[str, Span]:
    c, counts = class_gradients(model, *batch, num_classes=classes, batch_norm="running")
    drawn = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed)).to(c)
    return {
        "class gradients": orthonormal_span([c[counts > 0]]),
        "mean directions": mean_span([list(p.shape) for p in trainable_parameters(model).values()]),
        "random": identity_span(torch.linalg.qr(drawn.T)[0].T),
    }


def _gradient(at: Resumed, batch: Batch) -> Tensor:
    return Objective(at.model, [batch], at.spec.task.loss, batch_norm="running").gradient()


def _position(model: nn.Module) -> Tensor:
    return flatten(p.detach() for p in trainable_parameters(model).values()).clone()


def _loss_at(model: nn.Module, objective: Objective, position: Tensor, back: Tensor) -> float:
    """L at another position; the model is put back."""
    parameters = list(trainable_parameters(model).values())

    def place(flat: Tensor) -> None:
        with torch.no_grad():
            for p, value in zip(parameters, unflatten(flat, parameters), strict=True):
                p.copy_(value)

    place(position)
    value = objective.loss()
    place(back)
    return value
