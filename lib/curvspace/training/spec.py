"""What one training run is, as the pipeline hands it over: plain values, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from curvspace.training.schedule import Schedule

IDENTITY = ("dataset", "model", "optimizer", "batch_size", "lr", "seed")
"""Columns that name a run in every tidy table made from it."""
PRECISIONS = ("float32", "bfloat16")
MEMORY_FORMATS = ("contiguous", "channels-last")

CHOICES = {
    "augment": ("none", "crop-flip"),
    "precision": PRECISIONS,
    "memory_format": MEMORY_FORMATS,
    "compile": (False, True),
}
LEAST = {
    "augment_padding": 0,
    "evaluate_every": 0,
    "evaluate_train": 1,
    "checkpoint_every": 0,
    "min_steps": 1,
    "max_steps": 1,
}
"""The whole numbers of a task, with the least that each may be."""


def require_whole(key: str, value: object, least: int) -> None:
    """Raise ``ValueError`` for what is no whole number of at least ``least``; True and 2.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")


def require_number(key: str, value: object, above: float, below: float = math.inf) -> None:
    """Raise ``ValueError`` for what is no finite number between the bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and above < value < below):  # type: ignore[operator]
        limits = f"greater than {above:g}" + (f" and less than {below:g}" if below < math.inf else "")
        raise ValueError(f"{key} must be a finite number {limits}, got {value!r}")


@dataclass(frozen=True)
class Block:
    """A model or optimiser as the config has it: its ``name`` there, its ``kind`` and that kind's ``options``.

    ``{name: mine, kind: sgd, momentum: 0.9}`` -> ``Block("mine", "sgd", {"momentum": 0.9})``.
    """

    name: str
    kind: str
    options: dict[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Block:
        """From the config's mapping; a block that was never named has the name of its kind."""
        if not isinstance(values.get("kind"), str):
            raise ValueError(f"a block of the config needs a kind, got {dict(values)!r}")
        rest = {key: value for key, value in values.items() if key not in ("name", "kind")}
        return cls(values.get("name", values["kind"]), values["kind"], rest)


@dataclass(frozen=True)
class Task:
    """How long a (data set, model) pair is trained, and what is recorded on the way.

    epochs: passes over the training set; min_steps lengthens a run (large batches), max_steps cuts it (None: no cut).
    augment: "none" or "crop-flip" (random crop after zero padding by ``augment_padding`` pixels, horizontal flip).
    evaluate_every: steps between evaluations; 0 means at the end of each epoch.
    evaluate_train: training examples in the evaluation (the first n, without augmentation).
    checkpoints: steps to save at; checkpoint_every: also every so many steps (0: none); the last step always is.
    schedule: the learning rate along the run, see :class:`~curvspace.training.schedule.Schedule`; None: constant.
    evaluate_average: decay in (0, 1) of a running mean of the weights over the steps; evaluations then report the
    network with the mean weights too (columns ``average_...``). None: no mean.
    divergence: a minibatch loss above this multiple of the loss at the start ends the run as diverged.
    precision: "float32", or "bfloat16": the network's products and convolutions of a step under ``torch.autocast``
    (parameters, their state and evaluations stay in float32; first-order optimisers alone).
    memory_format: "contiguous" or "channels-last", of images and of what convolutions hold: faster on recent GPUs.
    compile: whether ``torch.compile`` makes the network's kernels (first-order optimisers alone).
    """

    epochs: float = 1.0
    loss: str = "cross_entropy"
    augment: str = "none"
    augment_padding: int = 4
    evaluate_every: int = 0
    evaluate_train: int = 2000
    checkpoints: tuple[int, ...] = ()
    checkpoint_every: int = 0
    min_steps: int = 1
    max_steps: int | None = None
    schedule: Schedule | Mapping[str, Any] | None = None
    evaluate_average: float | None = None
    divergence: float = 100.0
    precision: str = "float32"
    memory_format: str = "contiguous"
    compile: bool = False

    def __post_init__(self) -> None:
        require_number("task.epochs", self.epochs, above=0)
        require_number("task.divergence", self.divergence, above=1)
        if self.evaluate_average is not None:
            require_number("task.evaluate_average", self.evaluate_average, above=0, below=1)
        for key, least in LEAST.items():
            if not (key == "max_steps" and self.max_steps is None):
                require_whole(f"task.{key}", getattr(self, key), least)
        if not isinstance(self.checkpoints, list | tuple):
            raise ValueError(f"task.checkpoints must be a list of steps, got {self.checkpoints!r}")
        for i, step in enumerate(self.checkpoints):
            require_whole(f"task.checkpoints[{i}]", step, 0)
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        if not isinstance(self.loss, str):
            raise ValueError(f"task.loss must be a loss by its name, got {self.loss!r}")
        for key, allowed in CHOICES.items():
            value = getattr(self, key)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
                raise ValueError(f"task.{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if not isinstance(self.schedule, Schedule | Mapping | None):
            raise ValueError(f"task.schedule must be a block like {{kind: cosine}}, or null, got {self.schedule!r}")
        object.__setattr__(self, "schedule", Schedule.of(self.schedule))

    def steps(self, examples: int, batch_size: int) -> int:
        """Total number of steps: the last, smaller minibatch of an epoch is a step too."""
        total = round(self.epochs * steps_per_epoch(examples, batch_size))
        total = max(total, self.min_steps)
        return total if self.max_steps is None else min(total, self.max_steps)

    def saves(self, step: int, total: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        regular = self.checkpoint_every > 0 and step % self.checkpoint_every == 0
        return step == total or step in self.checkpoints or regular


@dataclass(frozen=True)
class RunSpec:
    """One run: the named blocks of the config that it needs, and nothing else.

    dataset, model, optimizer: the block with its ``name``; see :func:`curvspace.datasets.load`,
    :func:`curvspace.models.build`, :func:`curvspace.optim.registry.build`.
    """

    dataset: Mapping[str, Any]
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    batch_size: int | str
    lr: float
    seed: int = 0
    device: str = "cpu"
    task: Task = field(default_factory=Task)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """From parsed JSON; an unknown key is an error that names it."""
        allowed = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - allowed):
            raise ValueError(f"unknown key {unknown[0]!r} in a run's spec; allowed: {', '.join(sorted(allowed))}")
        task_allowed = {f.name for f in fields(Task)}
        for key in ("dataset", "model", "optimizer", "task"):
            if not isinstance(values.get(key, {}), Mapping):
                raise ValueError(f"a run's spec needs a block of keys as {key}, got {values[key]!r}")
        task = dict(values.get("task", {}))
        if "lr_decay_per_epoch" in task:
            raise ValueError("task.lr_decay_per_epoch is now task.schedule: {kind: per-epoch, decay: ...}")
        if unknown := sorted(set(task) - task_allowed):
            raise ValueError(f"unknown key {unknown[0]!r} in task; allowed: {', '.join(sorted(task_allowed))}")
        for key in ("batch_size", "lr"):
            if key not in values:
                raise ValueError(f"a run's spec needs {key}")
        for key in ("dataset", "model", "optimizer"):
            if "name" not in values.get(key, {}):
                raise ValueError(f"a run's spec needs {key}.name, got {values.get(key)!r}")
        return cls(**{**values, "task": Task(**task)})

    def __post_init__(self) -> None:
        if self.batch_size != "full":
            size = self.batch_size
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"batch_size must be a whole number of at least 1, or 'full', got {size!r}")
        require_number("lr", self.lr, above=0)
        require_whole("seed", self.seed, 0)
        if not isinstance(self.device, str):
            raise ValueError(f"device must be a device's name, got {self.device!r}")

    def resolved(self, examples: int) -> RunSpec:
        """The same run with the size of a full batch as a number, and none larger than the training set."""
        size = examples if self.batch_size == "full" else min(int(self.batch_size), examples)
        return replace(self, batch_size=size)

    def on(self, device: str) -> RunSpec:
        """The same run on a device by its own name ("auto" decided)."""
        return replace(self, device=device)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The columns :data:`IDENTITY`."""
        names = {key: getattr(self, key)["name"] for key in ("dataset", "model", "optimizer")}
        return {**names, "batch_size": self.batch_size, "lr": self.lr, "seed": self.seed}


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)
