"""One run from its spec to its directory, resumable at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from curvspace import datasets
from curvspace.optim import registry
from curvspace.optim.base import ModelOptimizer
from curvspace.training.loop import FitState, fit
from curvspace.training.record import RunRecord, initial_model
from curvspace.training.spec import RunSpec


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
) -> RunRecord:
    """Train one run and write ``metrics.csv``, ``checkpoints/step-{n}.pt``, ``run.json`` into ``out_dir``.

    Until its end everything lies in ``state_dir`` (default: beside ``out_dir``), where a later call with the same
    spec and ``fingerprint`` finds it and continues, bit for bit on the same device and thread count; anything else
    found there is discarded. Divergence is a result (``status: diverged``), not an error.

    Raises
    ------
    Interrupted
        On SIGINT or SIGTERM, after the state was saved.
    """
    out, state_path = Path(out_dir), Path(state_dir or f"{out_dir}.state")
    device = torch.device(spec.device)
    options = {k: v for k, v in spec.dataset.items() if k != "name"}
    data = datasets.load(data_dir, options).to(device)
    key = json.dumps([spec.to_dict(), fingerprint], sort_keys=True, default=list)
    spec = spec.resolved(len(data.train))
    batch_size = int(spec.batch_size)
    model = initial_model(dict(spec.model), data, spec.seed).to(device)
    optimizer = build_optimizer(spec, model, data.num_classes)
    state = _restore(state_path, key, model, optimizer)
    total = spec.task.steps(len(data.train), batch_size)
    last_save = time.monotonic()

    with _stop_signals() as stop:

        def after_step(now: FitState) -> None:
            nonlocal last_save
            if spec.task.saves(now.step, total) or now.status == "diverged":
                _write(state_path / "checkpoints" / f"step-{now.step}.pt", _checkpoint(spec, now, model, optimizer))
            if stop.requested or time.monotonic() - last_save > save_every_s:
                _save(state_path, key, now, model, optimizer)
                last_save = time.monotonic()
            if stop.requested and now.step < total:
                raise Interrupted(f"stopped at step {now.step} of {total}; the same command continues from there")

        name = "{dataset}/{model}/{optimizer} lr={lr} bs={batch_size} seed={seed}".format(**spec.identity)
        state = fit(
            model,
            optimizer,
            data,
            spec.task,
            batch_size,
            spec.seed,
            state=state,
            after_step=after_step,
            progress=progress,
            description=name,
        )
    _publish(spec, state, state_path, out, provenance or {})
    return RunRecord(out)


def build_optimizer(spec: RunSpec, model: torch.nn.Module, num_classes: int) -> ModelOptimizer:
    """The optimiser of a run's config block, at the run's learning rate."""
    options = {k: v for k, v in spec.optimizer.items() if k not in ("name", "kind")}
    return registry.build(spec.optimizer["kind"], options, model, num_classes, spec.lr, spec.task.loss)


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


def _write(path: Path, value: Any) -> None:
    """Atomically: a reader finds the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def _save(path: Path, key: str, state: FitState, model: torch.nn.Module, optimizer: ModelOptimizer) -> None:
    rows = [{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in state.rows]
    progress = {**vars(state), "rows": rows}
    saved = {"key": key, "progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    _write(path / "resume.pt", saved)


def _restore(path: Path, key: str, model: torch.nn.Module, optimizer: ModelOptimizer) -> FitState | None:
    """Continue what lies in the state directory if it is this run's; else clear it."""
    file = path / "resume.pt"
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        if saved["key"] == key:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            return FitState(**saved["progress"])
    shutil.rmtree(path, ignore_errors=True)
    return None


def _publish(spec: RunSpec, state: FitState, state_path: Path, out: Path, provenance: dict[str, Any]) -> None:
    """Move the finished run to its place, ``run.json`` last: its presence says that the run is whole."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.move(state_path / "checkpoints", out / "checkpoints")
    table = pd.DataFrame(state.rows)
    for position, (column, value) in enumerate(spec.identity.items()):
        table.insert(position, column, value)
    table.to_csv(out / "metrics.csv", index=False)
    record = {
        **provenance,
        "status": state.status,
        "steps": state.step,
        "wall_s": round(state.wall_s, 3),
        "spec": spec.to_dict(),
        "final": {k: v for k, v in state.rows[-1].items() if k.startswith(("eval_", "val_", "average_"))},
    }
    partial = out / "run.json.partial"
    partial.write_text(json.dumps(record, indent=2, default=list) + "\n")
    os.replace(partial, out / "run.json")
    shutil.rmtree(state_path, ignore_errors=True)


class _Stop:
    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM are noted, and acted upon after the step under way."""
    stop = _Stop()

    def note(*_: Any) -> None:
        stop.requested = True

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: the caller's business
            break
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
