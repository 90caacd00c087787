"""What shows once a network and its optimiser are built: asked before the first job, on shapes alone.

``python -m workflow.built_checks`` reads the specs of jobs from its input and prints one line for each that cannot end
well. It is a process of its own: the plan needs no torch, and code of the user's that fails here fails alone. Networks
are built on torch's device "meta", which keeps shapes and no numbers, so a network of any size costs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow import data_facts
from workflow.data_facts import Facts
from workflow.spec_files import canonical

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workflow.specs import Job, Plan

EIGENPAIRS = ("k", "top", "bottom")
"""Options of measures that count eigenpairs of a matrix of the size of the parameters."""
FLOAT_BYTES = 4
PATIENCE_S = 600
Block = Mapping[str, Any]


def said_of(plan: Plan, jobs: Iterable[Job]) -> list[str]:
    """The lines on these jobs of a plan; none where torch is not here (jobs may have an environment of their own)."""
    asked = [
        {
            "name": job.name,
            "memory_mb": plan.resource(job.stage, "mem_mb", 0),
            "trainings": list(_trainings(plan, job)),
            "eigenpairs": _eigenpairs(job),
        }
        for job in jobs
    ]
    asked = [each for each in asked if each["trainings"]]
    if not asked:
        return []
    command = [sys.executable, "-m", "workflow.built_checks"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode == 0:
            return [line for line in done.stdout.splitlines() if line.startswith("config: ")]
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = " ".join(str(error).split())
    print(f"curvspace: the networks could not be tried before the first job: {why}", file=sys.stderr)
    return []


def _trainings(plan: Plan, job: Job) -> Iterator[Block]:
    """The training that a job is, those whose runs a measure looks at, or the one that a measure does itself."""
    if job.stage == "train":
        yield {"stage": "train", **job.spec}
    elif job.stage == "measure":
        options = job.spec["options"]
        if all(isinstance(options.get(key), Mapping) for key in ("model", "optimizer", "task")):
            block = plan.config["datasets"].get(options.get("dataset"))
            lrs = options.get("lrs") or [options.get("lr", 0.1)]
            if block and isinstance(lrs, list):
                dataset = {**block, "name": options["dataset"]}
                yield {**options, "stage": "measure", "dataset": dataset, "lr": float(lrs[0])}
        yield from ({"stage": "measured", **plan.train(run).spec} for run in plan.runs_of(job.name))


def _eigenpairs(job: Job) -> dict[str, int]:
    options = job.spec["options"] if job.stage == "measure" else {}
    return {key: options[key] for key in EIGENPAIRS if isinstance(options.get(key), int)}


def problems(asked: Iterable[Block]) -> Iterator[str]:
    """One line for each job of a list of ``{name, memory_mb, trainings, eigenpairs}`` that cannot end well."""
    for job in asked:
        for training in job["trainings"]:
            if data_facts.variant(training["dataset"]) is None:
                continue
            dataset, model = training["dataset"], training["model"]
            size, lines = _network(canonical([dataset, model, training["batch_size"]]))
            if training["stage"] != "measured":
                yield from lines or _training(training, size, job["memory_mb"])
            for option, count in job["eigenpairs"].items():
                if 0 < size < count:
                    yield (
                        f"measure {job['name']}: {option} = {count} is not allowed; allowed: at most {size}, the "
                        f"parameters of models.{model['name']}"
                    )


def _training(training: Block, size: int, memory_mb: int) -> Iterator[str]:
    """What is wrong with a training whose network fits its data."""
    name, key = training["model"]["name"], f"resources.{training['stage']}.mem_mb"
    needed = 2 * FLOAT_BYTES * size / 2**20  # the parameters and their gradient
    if 0 < memory_mb < needed:
        yield (
            f"models.{name} has {size:,} parameters, which with their gradient take {needed:,.0f} MB, but {key} is "
            f"{memory_mb}; make the network smaller, or raise {key}"
        )
        return
    optimizer, loss = training["optimizer"], training["task"].get("loss", "cross_entropy")
    if isinstance(optimizer.get("k"), int) and optimizer["k"] > size:
        yield (
            f"optimizers.{optimizer['name']}.k = {optimizer['k']} is not allowed; allowed: at most {size}, the "
            f"parameters of models.{name} with datasets.{training['dataset']['name']}"
        )
        return
    yield from _optimizer(canonical([training["dataset"], training["model"], optimizer, loss, training["lr"]]))


@cache
def _network(written: str) -> tuple[int, list[str]]:
    """(Parameters of a network, what is wrong with it for its data); (0, ...) where it cannot be built."""
    from curvspace.training.run import check_outputs

    dataset, block, batch = json.loads(written)
    size = 0

    def fit(device: str) -> None:
        nonlocal size
        model = _built(dataset, block, device)
        size = sum(parameter.numel() for parameter in model.parameters())
        inputs, targets = _smallest_batch(_facts(dataset), batch, device)
        check_outputs(model.train(), "the network", inputs, targets, _facts(dataset).classes)

    shape = "×".join(map(str, _facts(dataset).shape))
    where = f"models.{block['name']} with datasets.{dataset['name']}, examples of {shape}"
    refused = _refused(fit, block["kind"])
    return size, [f"{where}: {refused}"] if refused else []


def _smallest_batch(facts: Facts, batch: int | str, device: str) -> tuple[Tensor, Tensor]:
    """The last minibatch of an epoch: batch normalisation refuses a single example of one pixel."""
    import torch

    size = facts.train if batch == "full" else min(int(batch), facts.train)
    size = facts.train % size or size
    if facts.numbers:
        return torch.zeros(size, *facts.shape, device=device), torch.zeros(size, facts.classes, device=device)
    return torch.zeros(size, *facts.shape, device=device), torch.zeros(size, dtype=torch.int64, device=device)


@cache
def _optimizer(written: str) -> list[str]:
    """What an optimiser says of its options when it is made for a network."""
    from curvspace.optim import registry

    dataset, model, block, loss, lr = json.loads(written)
    options = {key: value for key, value in block.items() if key not in ("name", "kind")}

    def make(device: str) -> None:
        registry.build(block["kind"], options, _built(dataset, model, device), _facts(dataset).classes, lr, loss)

    refused = _refused(make, block["kind"] + model["kind"])
    return [f"optimizers.{block['name']}: {refused}"] if refused else []


def _facts(dataset: Block) -> Facts:
    facts = data_facts.variant(dataset)
    assert facts is not None
    return facts


def _built(dataset: Block, block: Block, device: str) -> nn.Module:
    import torch

    from curvspace import models

    options = {key: value for key, value in block.items() if key not in ("name", "kind")}
    with torch.device(device):
        return models.build(block["kind"], options, _facts(dataset).shape, _facts(dataset).classes)


def _refused(check: Callable[[str], None], kind: str) -> str:
    """Why a check fails, in one line; empty if it does not. Code of the user's may not know the device "meta"."""
    for device in ("meta", "cpu") if ":" in kind else ("meta",):
        try:
            check(device)
        except Exception as error:
            if "cuda" in str(error).lower():
                return ""  # there may be a GPU where its jobs run
            why = " ".join(str(error).split()) or type(error).__name__
        else:
            return ""
    return why


def main() -> None:
    """Read jobs from the standard input, print the lines, each once."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return
    sys.path.append(str(Path.cwd()))
    with redirect_stdout(sys.stderr):  # a user's network may print
        lines = list(dict.fromkeys(problems(json.load(sys.stdin))))
    for line in lines:
        print(f"config: {line}")


if __name__ == "__main__":
    main()
