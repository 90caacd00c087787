"""From the options of a command to a network with its weights, batches and an objective."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvspace import Objective, datasets, models
from curvspace.batches import as_pairs, batch_size, layout, select, take
from curvspace.cli.common import load_function, set_threads
from curvspace.cli.options import Subject, parsed
from curvspace.curvature.frozen import FrozenModel
from curvspace.datasets.catalogue import EMBEDDED, KNOWN, MADE_HERE, source_names
from curvspace.datasets.store import Arrays
from curvspace.device import use
from curvspace.errors import UserError, refuse_text
from curvspace.seeds import derived_seed, replayed_randomness
from curvspace.training import tensor_file
from curvspace.training.record import RunRecord, data_options

DTYPES = {"float32": torch.float32, "float64": torch.float64}
EXAMPLES = 2000
"""Of a named data set, unless the user says how many."""

BATCH_SIZE = 500
"""Of a data set, unless the user says otherwise."""

Cut = tuple[Any, Any, int]
"""A batch (inputs, targets) of which parts were taken, and their number of examples."""


@dataclass
class Loaded:
    """What a command computes on. ``steps``: checkpoints of the run to look at; [0] without a run."""

    subject: Subject
    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    loss: Any
    record: RunRecord | None
    steps: list[int]
    device: torch.device

    def at(self, step: int) -> nn.Module:
        """The network with the weights of a step of its run."""
        if self.record is not None:
            self.model.load_state_dict(self.record.checkpoint(step, self.device)["model"])
        return self.model

    @property
    def options(self) -> dict[str, Any]:
        """Of the objective."""
        return {
            "batch_norm": self.subject.batch_norm,
            "dtype": DTYPES[self.subject.dtype],
            "parameters": self.subject.parameters or None,
        }

    def objective(self) -> Objective:
        if len(self.steps) > 1:
            raise UserError("--step all is for sharpness; name one step, or leave it out for the last")
        with user_errors():
            return Objective(self.at(self.steps[-1]), self.batches, self.loss, **self.options)

    def operator(self) -> Any:
        with user_errors():
            one = self.objective()
            return one.hessian() if self.subject.matrix == "hessian" else one.gauss_newton()

    @property
    def description(self) -> dict[str, Any]:
        """What the result is of, for the output."""
        return {
            "of": str(self.subject.run or self.subject.model),
            "data": self.subject.data or "the run's training data",
            "examples": sum(batch_size(y) for _, y in self.batches),
            "parameters": FrozenModel(self.model, parameters=self.subject.parameters or None).size,
            "step": self.steps[-1] if self.record else None,
            "matrix": self.subject.matrix,
            "batch_norm": self.subject.batch_norm,
            "dtype": self.subject.dtype,
            "device": str(self.device),
            "torch": torch.__version__,
        }


@contextmanager
def user_errors() -> Iterator[None]:
    """What the library refuses, as one line."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def opened(subject: Subject) -> Iterator[Loaded]:
    """Everything that a command needs, on the device that was asked for."""
    _check(subject)
    set_threads(subject.threads)
    with use(subject.device) as device, user_errors():
        if subject.run is not None:
            yield _of_run(subject, subject.run, device)
            return
        assert subject.model is not None
        assert subject.data is not None
        batches, shape, classes, cuts = _data(subject.data, subject)
        model = _model(subject.model, parsed(subject.model_option), shape, classes, subject.seed)
        if subject.checkpoint is not None:
            load_weights(model, subject.checkpoint)
        loss = _loss(subject.loss or "cross_entropy")
        for cut in cuts:
            _require_parts(model.eval(), cut, loss, subject)
        yield Loaded(subject, model.to(device).eval(), batches, loss, None, [0], device)


def _check(subject: Subject) -> None:
    allowed = {"matrix": ("hessian", "gauss-newton"), "dtype": tuple(DTYPES), "batch_norm": ("running", "batch")}
    for name, values in allowed.items():
        if getattr(subject, name) not in values:
            raise UserError(f"--{name.replace('_', '-')} must be {' or '.join(values)}, got {getattr(subject, name)!r}")
    if subject.run is None and not (subject.model and subject.data):
        raise UserError("give the folder of a run, or --model and --data; examples: curvspace eigs --help")
    for option in ("model", "model_option", "checkpoint", "data"):
        if subject.run is not None and getattr(subject, option):
            name = option.replace("_", "-")
            raise UserError(f"a run knows its network, weights and data; leave out --{name}, or leave out the run")
    if subject.run is None and subject.step != "last":
        raise UserError("--step is of a run; give the run's folder, or leave it out")
    for name in ("examples", "batches", "batch_size"):
        value = getattr(subject, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _of_run(subject: Subject, folder: Path, device: torch.device) -> Loaded:
    record = RunRecord(folder)
    if subject.step == "all":
        steps = record.steps
    elif subject.step == "last":
        steps = record.steps[-1:]
    elif subject.step.isdigit() and int(subject.step) in record.steps:
        steps = [int(subject.step)]
    else:
        raise UserError(f"{folder} has no checkpoint {subject.step!r}; it has {_some(record.steps)}, or: last, all")
    block = data_options(record.spec["dataset"])
    data = datasets.load(_folder(subject, datasets.folder_name(record.spec["dataset"]["name"], block)), block)
    batches, _ = limited(_named(data, subject), subject.batches, subject.examples or EXAMPLES)
    loss = _loss(subject.loss or record.spec.get("task", {}).get("loss", "cross_entropy"))
    model = record.build_model(data).to(device).eval()
    return Loaded(subject, model, batches, loss, record, steps, device)


def _some(steps: list[int]) -> str:
    shown = [*map(str, steps[:5]), *(["…", str(steps[-1])] if len(steps) > 5 else [])]
    return ", ".join(shown) or "none"


def _folder(subject: Subject, name: str) -> Path:
    folder = subject.data_folder / name
    if (subject.data_folder / "arrays.npz").is_file():
        return subject.data_folder
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; make it with: curvspace data {name} --out {folder}")
    return folder


def _named(data: datasets.DataSet, subject: Subject) -> Iterable[Any]:
    return data.batches("train", subject.batch_size or BATCH_SIZE)


def _data(name: str, subject: Subject) -> tuple[list[tuple[Any, Tensor]], tuple[int, ...], int, list[Cut]]:
    """Batches, the shape of an example, and the number of classes (of outputs), of named data or the user's; what was
    cut of the user's batches."""
    if ":" in name:
        found = load_function(name)()
        if not isinstance(found, Arrays):
            given, of_pair = as_batches(found, subject.batch_size, name)
            batches, of_last = limited(given, subject.batches, subject.examples)
            return batches, _shape(batches), _classes(batches), of_pair + of_last
        data = _prepared(name, subject)
    elif name in source_names():
        data = _prepared(name, subject)
    else:
        raise UserError(f"--data {name!r} is no data set; there are: {', '.join(source_names())}, or module:function")
    batches, _ = limited(_named(data, subject), subject.batches, subject.examples or EXAMPLES)
    return batches, data.input_shape, data.num_classes, []


def _prepared(name: str, subject: Subject) -> datasets.DataSet:
    """A prepared data set; what needs no network is made on the spot where it is missing, a function's always."""
    here = subject.data_folder / name
    if ":" in name or (name in (*EMBEDDED, *MADE_HERE) and not here.is_dir()):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            datasets.prepare(name, Path(folder) / "set", offline=True)
            return datasets.load(Path(folder) / "set", {"source": name})
    return datasets.load(_folder(subject, name) if name in KNOWN else here, {"source": name})


def as_batches(found: Any, size: int | None, name: str) -> tuple[Iterable[tuple[Any, Tensor]], list[Cut]]:
    """Batches of what a user's function returned: a pair of tensors, a data set, or anything that gives batches.

    A pair is one batch unless a size is given; then the parts, and what was cut.
    """
    if isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[1], Tensor | np.ndarray):
        ((x, y),) = as_pairs([found])
        n, flags = layout(0, x, y, None)
        if size is None or n <= size:
            return [(x, y)], []
        return [take((x, y), slice(i, i + size), flags) for i in range(0, n, size)], [(x, y, size)]
    if isinstance(found, torch.utils.data.Dataset) and not isinstance(found, torch.utils.data.IterableDataset):
        return torch.utils.data.DataLoader(found, batch_size=size or BATCH_SIZE), []
    if isinstance(found, Iterable):
        return found, []
    raise UserError(
        f"{name} returned {type(found).__name__}; wanted: (inputs, targets), a data set, a loader, or a list of batches"
    )


def limited(
    batches: Iterable[Any], count: int | None, examples: int | None
) -> tuple[list[tuple[Any, Tensor]], list[Cut]]:
    """The first batches, the last of them cut to the number of examples; what was cut."""
    kept: list[tuple[Any, Tensor]] = []
    cuts: list[Cut] = []
    room = examples
    for i, batch in enumerate(islice(batches, count)):
        ((x, y),) = as_pairs([batch])
        n, _ = layout(i, x, y, None)
        if room is not None and n > room:
            cuts.append((x, y, room))
            (x, y), n = select((x, y), slice(0, room), size=n), room
        kept.append((x, y))
        if room is not None and (room := room - n) == 0:
            break
    if not kept:
        raise UserError("the data gave no batch")
    return kept, cuts


def _require_parts(model: nn.Module, cut: Cut, loss: Any, subject: Subject) -> None:
    """Raise ``UserError`` where parts of a batch make another function than the whole.

    Batch normalisation does not count: its statistics are those of the batches that are asked for.
    """
    x, y, size = cut
    options: dict[str, Any] = {"batch_norm": "running", "dtype": DTYPES[subject.dtype]}
    with suppress(ValueError):
        _ = Objective(model, [(x, y)], loss, microbatch=size, **options).batches
        return
    whole = Objective(model, [(x, y)], loss, microbatch=None, **options).loss()  # the model's own error, if any
    if math.isfinite(whole):
        raise UserError(
            f"a batch of {batch_size(y)} examples cannot be cut into parts of {size}: the model or the loss does "
            "not treat examples one by one; leave out --batch-size and --examples, or let --data give minibatches"
        )


def _shape(batches: list[tuple[Any, Tensor]]) -> tuple[int, ...]:
    x = batches[0][0]
    return tuple(x.shape[1:]) if isinstance(x, Tensor) else ()


def _classes(batches: list[tuple[Any, Tensor]]) -> int:
    targets = [y for _, y in batches]
    if targets[0].is_floating_point():
        return int(targets[0].shape[1]) if targets[0].ndim > 1 else 1
    return max(int(y.max()) for y in targets) + 1


def _model(kind: str, options: dict[str, Any], shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A kind of ours or a function with two required arguments gets shape and classes; any other its options alone."""
    with replayed_randomness(torch.device("cpu"), derived_seed(seed, "init")):
        if ":" not in kind:
            return models.build(kind, options, shape, classes)
        function = load_function(kind)
        if isinstance(function, nn.Module):
            return function
        required = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in options
        ]
        if len(required) == 2:
            return models.build(kind, options, shape, classes)
        if required:
            lacking = required[0].name
            raise UserError(f"--model {kind}: its argument {lacking!r} has no value; give --model-option {lacking}=…")
        refuse_text(f"--model {kind}", function, options)
        made = function(**options)
    if not isinstance(made, nn.Module):
        raise UserError(f"--model {kind} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _loss(name: str) -> Any:
    return load_function(name) if ":" in name else name


def load_weights(model: nn.Module, file: Path) -> None:
    """Weights from a file of torch (a state dict, or one under ``model`` or ``state_dict``) or of safetensors.

    Prefixes that wrappers add to every name (``module.``, ``_orig_mod.``, ``model.``) are taken off where that fits.
    """
    if not file.is_file():
        raise UserError(f"--checkpoint {file} is not there")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(file)
    else:
        tensor_file.check(file)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).split(". ")[0].split("\n")[0]
            raise UserError(f"--checkpoint {file} is not readable as weights: {reason}") from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    wanted = set(model.state_dict())
    for prefix in ("module.", "_orig_mod.", "model."):
        if isinstance(found, dict) and not wanted & set(found) and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"--checkpoint {file} holds no state dict")
    missing, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or extra:
        parts = [f"it lacks {missing[0]!r}" + _more(missing)] if missing else []
        parts += [f"it has {extra[0]!r}{_more(extra)}, which the network has not"] if extra else []
        raise UserError(f"--checkpoint {file} does not fit the network: {', and '.join(parts)}")
    model.load_state_dict(found)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
