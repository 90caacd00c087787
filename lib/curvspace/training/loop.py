"""The training loop: minibatches from device-resident data, any optimiser with ``step(inputs, targets)``.

All that is random is a function of (seed, epoch) or (seed, step): see :func:`~curvspace.seeds.derived_seed`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.datasets import DataSet, Split
from curvspace.datasets.augment import crop_flip
from curvspace.inputs import call
from curvspace.losses import Loss
from curvspace.optim.base import ModelOptimizer
from curvspace.progress import bar
from curvspace.seeds import derived_seed, seed_generators
from curvspace.training.average import accumulate, averaged
from curvspace.training.schedule import Schedule
from curvspace.training.spec import Task, steps_per_epoch

Row = dict[str, Any]
LOG_INTERVAL = {"cpu": 1, "cuda": 50}
"""Steps between readings of the scalars of a row, of all these rows in one transfer.

The loss alone is read at each step, on every device: a run that diverges ends at the same step everywhere.
"""


@dataclass
class FitState:
    """Where a training stands. ``status`` is "running", "finished" or "diverged"; ``wall_s`` counts steps only.

    ``average``: the running mean of the weights by name, where the task asks for one.
    """

    step: int = 0
    wall_s: float = 0.0
    status: str = "running"
    initial_loss: float = math.nan
    rows: list[Row] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: DataSet, split: Split, loss: Loss, limit: int | None = None
) -> tuple[float, float]:
    """Loss and accuracy (NaN where the targets are not classes) of the model in eval mode, as of one batch.

    Parts are put together by the loss's own weights, so that class weights, ignored labels and sums count as in the
    whole. The module's training mode is put back. ``limit``: only the first so many examples.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = min(len(split), limit or len(split))
    loss_sum, weights, correct = 0.0, 0.0, 0.0
    for start in range(0, total, 1000):
        part = slice(start, min(start + 1000, total))
        targets = split.targets[part]
        outputs = call(model, data.normalise(split.inputs[part]))
        if weight := loss.weight(targets):  # where no label counts, a mean is 0/0
            with loss.at_rest():
                loss_sum += float(loss(outputs, targets)) * weight
            weights += weight
        if not targets.is_floating_point():
            correct += float((outputs.argmax(1) == targets).sum())
    for module, training in modes:
        module.training = training
    classes = total > 0 and not split.targets.is_floating_point()
    whole = 1.0 if loss.reduction == "sum" else weights
    return loss_sum / whole if weights else math.nan, correct / total if classes else math.nan


def minibatches(data: DataSet, task: Task, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches of the training set from step ``start`` on, without end, as (inputs, targets).

    Each epoch is a permutation of the examples; its last minibatch may be smaller.
    """
    device = data.train.targets.device
    per_epoch = steps_per_epoch(len(data.train), batch_size)
    order_generator, augment_generator = torch.Generator(), torch.Generator(device=device)
    step, order = start, None
    while True:
        epoch, position = divmod(step, per_epoch)
        if order is None or position == 0:
            order_generator.manual_seed(derived_seed(seed, "order", epoch))
            order = torch.randperm(len(data.train), generator=order_generator).to(device)
        index = order[position * batch_size : (position + 1) * batch_size]
        inputs = data.train.inputs[index]
        if task.augment == "crop-flip":
            augment_generator.manual_seed(derived_seed(seed, "augment", step))
            inputs = crop_flip(inputs, augment_generator, task.augment_padding)
        inputs = data.normalise(inputs)
        if task.memory_format == "channels-last" and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        yield inputs, data.train.targets[index]
        step += 1


def fit(
    model: nn.Module,
    optimizer: ModelOptimizer,
    data: DataSet,
    task: Task,
    batch_size: int,
    seed: int,
    *,
    state: FitState | None = None,
    after_step: Callable[[FitState], None] | None = None,
    progress: bool = True,
    description: str = "train",
) -> FitState:
    """Train until the task's last step or divergence; returns the state with one row of metrics a step.

    ``state`` continues an earlier one (model and optimiser must be as they were then). ``after_step`` is called
    after each step, and once before the first of a new run. A run is diverged when a minibatch loss is not finite
    or exceeds ``task.divergence`` times the loss of the untrained model on the evaluated training examples.
    """
    state = state or FitState()
    total = task.steps(len(data.train), batch_size)
    per_epoch = steps_per_epoch(len(data.train), batch_size)
    schedule = Schedule.of(task.schedule)
    for group in optimizer.param_groups:  # kept in the optimiser's state: a resumed run decays from the same value
        group.setdefault("initial_lr", group["lr"])
    device = data.train.targets.device
    interval = LOG_INTERVAL.get(device.type, 1)
    if not state.rows:
        state.rows.append({"step": 0, "epoch": 0.0, "wall_s": 0.0, **_evaluation(model, optimizer, data, task, state)})
        state.initial_loss = state.rows[0]["eval_train_loss"]
        if after_step:
            after_step(state)
    model.train()
    batches = minibatches(data, task, batch_size, seed, state.step)
    shown = bar(total=total, initial=state.step, desc=description, unit="step", show=progress)
    while state.step < total and state.status == "running":
        inputs, targets = next(batches)
        factor = schedule.factor(state.step, total, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        seed_generators(derived_seed(seed, "dropout", state.step), device)
        clock = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bfloat16"):
            loss = optimizer.step(inputs, targets)
        value = float(loss)
        row = {"train_loss": value, "grad_norm": optimizer.grad_norm, **optimizer.costs.as_dict(), **optimizer.log()}
        row["learning_rate"] = optimizer.param_groups[0]["lr"]
        state.step += 1
        if task.evaluate_average is not None:
            accumulate(state.average, model, task.evaluate_average, state.step)
        state.rows.append({"step": state.step, "epoch": state.step / per_epoch, **row})
        state.status = _status(value, task.divergence * state.initial_loss, state.step == total)
        evaluating = state.status == "diverged" or _evaluation_due(state.step, per_epoch, total, task)
        if evaluating or state.step % interval == 0:
            _read_scalars(state.rows, interval)
            shown.set_postfix(loss=f"{value:.4f}", refresh=False)
        state.wall_s += time.perf_counter() - clock
        state.rows[-1]["wall_s"] = state.wall_s
        if evaluating:
            state.rows[-1].update(_evaluation(model, optimizer, data, task, state))
        shown.update()
        if after_step:
            after_step(state)
    shown.close()
    return state


def _evaluation_due(step: int, per_epoch: int, total: int, task: Task) -> bool:
    return step == total or step % (task.evaluate_every or per_epoch) == 0


def _evaluation(model: nn.Module, optimizer: ModelOptimizer, data: DataSet, task: Task, state: FitState) -> Row:
    """The present network's losses and accuracies; with ``average_`` in front, those of the mean weights."""
    with optimizer.evaluated():
        row = _losses(model, optimizer.loss, data, task)
    if state.average:
        with averaged(model, state.average):
            mean = _losses(model, optimizer.loss, data, task)
        row.update({f"average_{name}": value for name, value in mean.items()})
    return row


def _losses(model: nn.Module, loss: Loss, data: DataSet, task: Task) -> Row:
    train_loss, train_accuracy = evaluate(model, data, data.train, loss, task.evaluate_train)
    val_loss, val_accuracy = evaluate(model, data, data.validation, loss)
    return {
        "eval_train_loss": train_loss,
        "eval_train_accuracy": train_accuracy,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
    }


def _read_scalars(rows: list[Row], interval: int) -> None:
    """Turn device scalars of the newest rows into floats, in one transfer."""
    waiting = [(row, key) for row in rows[-interval:] for key, value in row.items() if isinstance(value, Tensor)]
    if waiting:
        values = torch.stack([row[key].detach().double().reshape(()) for row, key in waiting]).tolist()
        for (row, key), value in zip(waiting, values, strict=True):
            row[key] = value


def _status(loss: float, bound: float, last: bool) -> str:
    if not math.isfinite(loss) or loss > bound:
        return "diverged"
    return "finished" if last else "running"
