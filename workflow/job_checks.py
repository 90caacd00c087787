"""What a job would fail on and the config shows: tasks against their data, measures against what runs keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from papers.common.study import Measure, Run, Study
from workflow import data_facts
from workflow.data_facts import Facts

STEPS = ("steps", "starts", "top_steps", "bottom_steps", "step")
"""Options of measures that name steps of a run."""
CROP_PADDING = 4
"""The default of a task's ``augment_padding``."""
MOST_STEPS = 10**9
"""Eleven days at a thousand steps a second."""


def problems(config: Mapping[str, Any], study: Study) -> Iterator[str]:
    """One line for each job of a study that cannot end well."""
    known = {name: data_facts.variant(block) for name, block in config["datasets"].items()}
    for key in sorted({f"{run.dataset}/{run.model}" for run in study.runs}):
        facts = known.get(key.partition("/")[0])
        if facts and key in config["tasks"]:
            yield from _task(f"tasks.{key}", config["tasks"][key], facts)
            batches = [run.batch for run in study.runs if f"{run.dataset}/{run.model}" == key]
            yield from _ends(f"tasks.{key}", config["tasks"][key], facts, batches)
            yield from _batches(key, facts, batches)
    for measure in study.measures:
        yield from _own_task(measure, known)
        for run in measure.runs:
            facts, task = known.get(run.dataset), config["tasks"].get(f"{run.dataset}/{run.model}")
            if facts and task:
                yield from _measure(measure, run, task, facts)


def _task(key: str, task: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """A task's loss and augmentation fit the data's targets and inputs, and its evaluation its size."""
    loss = task.get("loss", "cross_entropy")
    wanted = "mse" if facts.numbers else "cross_entropy"
    if loss != wanted:
        targets = "numbers" if facts.numbers else "classes"
        yield f"{key}.loss = {loss!r} does not fit targets that are {targets}; allowed: {wanted}"
    smallest = task.get("augment_padding", CROP_PADDING) + 1
    if task.get("augment", "none") == "crop-flip" and (not facts.images or min(facts.shape[1:]) < smallest):
        shape = "×".join(map(str, facts.shape))
        yield (
            f"{key}.augment = 'crop-flip' needs images of {smallest} pixels a side or more, but one example is "
            f"{shape}; allowed: none"
        )


def _ends(key: str, task: Mapping[str, Any], facts: Facts, batches: Iterable[int | str]) -> Iterator[str]:
    """Runs end some day."""
    for batch in dict.fromkeys(batches):
        if (total := last_step(task, facts.train, batch)) > MOST_STEPS:
            yield (
                f"{key}: {total:.3g} steps of {batch} examples are not allowed; allowed: at most {MOST_STEPS:,} "
                "(epochs, min_steps, max_steps)"
            )


def _batches(key: str, facts: Facts, batches: Iterable[int | str]) -> Iterator[str]:
    """No minibatch is larger than the training set: it would be the whole set under another name."""
    for batch in dict.fromkeys(batches):
        if isinstance(batch, int) and batch > facts.train:
            yield (
                f"runs of {key}: batch size = {batch} is not allowed; allowed: at most {facts.train}, which "
                f"datasets.{key.partition('/')[0]} has for training, or full"
            )


def _own_task(measure: Measure, known: Mapping[str, Facts | None]) -> Iterator[str]:
    """A measure that trains by itself has a task among its options."""
    facts = known.get(str(measure.spec.get("dataset")))
    if facts and isinstance(task := measure.spec.get("task"), Mapping):
        place = measure.name.rpartition("/")[0]
        yield from _task(f"the task of {place}", task, facts)
        batch = measure.spec.get("batch_size", "full")
        yield from _ends(f"the task of {place}", task, facts, [batch])
        yield from _batches(f"{measure.spec['dataset']}/{measure.spec.get('model')}", facts, [batch])


def _measure(measure: Measure, run: Run, task: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """A measure looks at checkpoints that its run keeps, and at examples that there are."""
    total = last_step(task, facts.train, run.batch)
    for option in STEPS:
        value = measure.spec.get(option)
        steps = value if isinstance(value, list) else [value] if option == "step" and value is not None else []
        for step in steps:
            if not _kept(task, step, total):
                key = f"tasks.{run.dataset}/{run.model}"
                reason = f"the run ends at step {total}" if step > total else f"{key} keeps no checkpoint there"
                remedy = "leave it out, or lengthen the run" if step > total else "add it to the task's checkpoints"
                yield f"measure {measure.name}: {option} has step {step} of {run.path}, but {reason}; {remedy}"
    examples = measure.spec.get("examples")
    if isinstance(examples, int) and examples > facts.train:
        yield (
            f"measure {measure.name}: examples = {examples} is not allowed; allowed: at most {facts.train}, which "
            f"datasets.{run.dataset} has for training"
        )


def last_step(task: Mapping[str, Any], examples: int, batch: int | str) -> int:
    """The step at which a run ends, as :meth:`curvspace.training.spec.Task.steps` has it."""
    size = examples if batch == "full" else min(int(batch), examples)
    total = max(round(task["epochs"] * -(-examples // size)), task.get("min_steps", 1))
    cut = task.get("max_steps")
    return total if cut is None else min(total, cut)


def _kept(task: Mapping[str, Any], step: int, total: int) -> bool:
    every = task.get("checkpoint_every", 0)
    regular = every > 0 and step % every == 0
    return step <= total and (step == total or step in task.get("checkpoints", ()) or regular)
