"""One run from its spec to its directory, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from curvspace import datasets
from curvspace.errors import UserError, values_refused
from curvspace.inputs import call
from curvspace.losses import Loss
from curvspace.optim import registry
from curvspace.optim.base import ModelOptimizer
from curvspace.outputs import logits
from curvspace.seeds import derived_seed
from curvspace.training import lock
from curvspace.training.loop import FitState, fit
from curvspace.training.record import RunRecord, data_options, initial_model
from curvspace.training.spec import Block, RunSpec
from curvspace.training.state import State, require_free, require_state


class Interrupted(RuntimeError):
    """The run was told to stop; its state is saved and the same command continues it."""


def train(
    spec: RunSpec,
    data_dir: str | Path,
    out_dir: str | Path,
    state_dir: str | Path | None = None,
    *,
    fingerprint: str = "",
    provenance: dict[str, Any] | None = None,
    save_every_s: float = 60.0,
    progress: bool = True,
    overwrite: bool = False,
) -> RunRecord:
    """Train one run and write ``metrics.csv``, ``checkpoints/step-{n}.pt``, ``run.json`` into ``out_dir``.

    Until its end everything lies in ``state_dir`` (default: beside ``out_dir``), where a later call with the same
    spec, data and ``fingerprint`` finds it and continues, bit for bit on the same kind of device and thread count;
    a run of anything else found there is discarded. A run that stands whole in ``out_dir`` already is not trained
    again; another finished run there is replaced with ``overwrite`` alone. Only files of a run's names are removed.
    Divergence is a result (``status: diverged``), not an error. Of two processes with one state folder the second
    waits for the first.

    Raises
    ------
    Interrupted
        On SIGINT, SIGTERM or SIGHUP, after the state was saved.
    UserError
        If a file cannot be written, another process took over while this one stood still, or one of the folders holds
        something else: files of other origin, or a finished run of other settings.
    """
    out, state_path, device = Path(out_dir), Path(state_dir or f"{out_dir}.state"), torch.device(spec.device)
    with values_refused():
        data = datasets.load(data_dir, data_options(spec.dataset))
    spec = spec.resolved(len(data.train))
    key = _key(spec, fingerprint, data.digest)
    require_state(state_path, out)
    with _stop_signals() as stop, lock.hold(state_path, lambda: stop.requested) as held:
        if held is None:
            raise Interrupted("stopped while another process held the run")
        state = State(state_path, key, held)
        require_free(out, state_path)
        if (record := _finished(out, key, overwrite)) is None:
            now = _run(spec, data.to(device), state, stop, save_every_s, progress)
            _publish(spec, now, state, out, {**(provenance or {}), "key": key})
            record = RunRecord(out)
        state.clear()
    return record


def _run(
    spec: RunSpec, data: datasets.DataSet, state: State, stop: _Stop, save_every_s: float, progress: bool
) -> FitState:
    """Train from where the state folder is to the end, which is saved there too."""
    device = torch.device(spec.device)
    batch_size = int(spec.batch_size)
    total = spec.task.steps(len(data.train), batch_size)

    def build() -> tuple[torch.nn.Module, ModelOptimizer]:
        model = initial_model(spec.model, data, spec.seed).to(device)
        if spec.task.memory_format == "channels-last":
            model = model.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(spec, model, data.num_classes)
        if spec.task.compile:
            model.compile()
        return model, optimizer

    with values_refused():
        model, optimizer = build()
    now = state.restore(model, optimizer, device)
    if now is None:
        model, optimizer = build()
        _check_outputs(model, optimizer.loss, spec, data)
    state.devices += [spec.device] if state.devices[-1:] != [spec.device] else []
    last_save = time.monotonic()

    def after_step(now: FitState) -> None:
        nonlocal last_save
        if spec.task.saves(now.step, total) or now.status == "diverged":
            state.save_checkpoint(now.step, _checkpoint(spec, now, model, optimizer))
        if stop.requested or time.monotonic() - last_save > save_every_s:
            state.save(now, model, optimizer)
            last_save = time.monotonic()
        if stop.requested and now.step < total:
            raise Interrupted(f"stopped at step {now.step} of {total}; the same command continues from there")

    name = "{dataset}/{model}/{optimizer} lr={lr} bs={batch_size} seed={seed}".format(**spec.identity)
    now = fit(
        model,
        optimizer,
        data,
        spec.task,
        batch_size,
        spec.seed,
        state=now,
        after_step=after_step,
        progress=progress,
        description=name,
    )
    state.save(now, model, optimizer)
    return now


def _check_outputs(model: torch.nn.Module, loss: Loss, spec: RunSpec, data: datasets.DataSet) -> None:
    """Network and loss fit the data set, tried on two of its examples in eval mode; the network stays as it was."""
    inputs, targets = data.normalise(data.train.inputs[:2]), data.train.targets[:2]
    named = f"model {spec.model['name']} ({spec.model['kind']})"
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        outputs = check_outputs(model.eval(), named, inputs, targets, data.num_classes)
        try:
            loss(outputs, targets)
        except ValueError as error:
            kind = "numbers" if targets.is_floating_point() else "classes"
            raise UserError(f"loss {spec.task.loss} does not fit targets that are {kind}: {error}") from error
    for module, training in modes:
        module.training = training


@torch.no_grad()
def check_outputs(
    model: torch.nn.Module, named: str, inputs: torch.Tensor, targets: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """The network's outputs, after a look that it has one for each class; ``named`` is what to call it.

    Raises
    ------
    UserError
        If the outputs are no tensor (N, C) with C at least the number of classes, or as many numbers as the
        targets where these are no classes.
    """
    try:
        outputs = logits(call(model, inputs))
    except Exception as error:
        error.add_note(f"[{named}, on inputs of shape {tuple(inputs.shape)}]")
        raise
    shape = tuple(outputs.shape)
    if targets.is_floating_point():
        fits, wanted = outputs.numel() == targets.numel(), f"as many numbers as the targets, {tuple(targets.shape)}"
    else:
        fits = len(shape) == 2 and shape[0] == len(targets) and shape[1] >= num_classes
        wanted = f"({len(targets)}, {num_classes}), one output for each of the {num_classes} classes"
    if not fits:
        raise UserError(f"{named} has outputs of shape {shape} for {len(targets)} examples; wanted is {wanted}")
    return outputs


def _key(spec: RunSpec, fingerprint: str, data: str) -> str:
    """What a run's numbers depend on, as a digest. The device is no part: a run may be continued on another."""
    parts = [replace(spec, device="").to_dict(), fingerprint, data, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def _finished(out: Path, key: str, overwrite: bool) -> RunRecord | None:
    """The run that stands whole in its place, if it is this one: its process ended between the last two steps."""
    try:
        record = RunRecord(out)
    except FileNotFoundError:
        return None
    if record.record.get("key") == key:
        return None if record.damage() else record
    if not overwrite:
        raise UserError(
            f"{out} holds a finished run of other settings, code, data or torch; name another folder, or ask for "
            "--overwrite (overwrite=True) to replace it"
        )
    return None


def build_optimizer(spec: RunSpec, model: torch.nn.Module, num_classes: int) -> ModelOptimizer:
    """The optimiser of a run's config block, at the run's learning rate; what it draws follows from the run's seed."""
    block = Block.of(spec.optimizer)
    seed = derived_seed(spec.seed, "optimizer")
    optimizer = registry.build(block.kind, block.options, model, num_classes, spec.lr, spec.task.loss, seed)
    if optimizer.couples_parameters and (spec.task.compile or spec.task.precision != "float32"):
        option = "compile = true" if spec.task.compile else f"precision = {spec.task.precision}"
        raise UserError(
            f"task.{option} is for first-order optimisers: {block.kind} needs curvature in full precision "
            "and derivatives of derivatives, which compiled kernels do not have; leave the option out"
        )
    return optimizer


def _checkpoint(spec: RunSpec, state: FitState, model: torch.nn.Module, optimizer: ModelOptimizer) -> dict[str, Any]:
    """Parameters, buffers, optimiser state; (seed, step) stand for all generators and the place in the data.

    Parameters are those that an evaluation sees; ``average`` holds their running mean, where the task asks for it.
    """
    with optimizer.evaluated():
        return {
            "step": state.step,
            "seed": spec.seed,
            "batch_size": spec.batch_size,
            "status": state.status,
            "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            **({"average": state.average} if state.average else {}),
        }


def _publish(spec: RunSpec, now: FitState, state: State, out: Path, provenance: dict[str, Any]) -> None:
    table = pd.DataFrame(now.rows)
    for position, (column, value) in enumerate(spec.identity.items()):
        table.insert(position, column, value)
    record = {
        **provenance,
        "status": now.status,
        "steps": now.step,
        "wall_s": round(now.wall_s, 3),
        "devices": state.devices,
        "spec": spec.to_dict(),
        "final": {k: v for k, v in now.rows[-1].items() if k.startswith(("eval_", "val_", "average_"))},
    }
    state.publish(out, record, table.to_csv(index=False).encode())


class _Stop:
    requested = False


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Signals to stop are noted, and acted upon after the step under way; one that was ignored (nohup) stays so."""
    stop = _Stop()

    def note(*_: Any) -> None:
        stop.requested = True

    previous = {}
    for number in STOP_SIGNALS:
        try:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: the caller's business
            break
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
