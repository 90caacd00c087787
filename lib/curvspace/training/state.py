"""The folder of an unfinished run, and how a finished one leaves it.

It holds ``checkpoints/step-{n}.pt`` as they are saved and ``resume.pt``, which lists those saved so far with their
digests. Publishing only adds to the run's folder and writes its record last; the state goes when all outputs are
whole. So whatever ends the process, the same command does the rest again from what lies here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from curvspace import files
from curvspace.errors import UserError
from curvspace.optim.base import ModelOptimizer
from curvspace.training import lock, tensor_file
from curvspace.training.loop import FitState

RESUME, CHECKPOINTS, RECORD, METRICS = "resume.pt", "checkpoints", "run.json", "metrics.csv"

_PARTIAL = r"(\.partial)?"
_OF_STATE = re.compile(rf"{lock.NAME}(\.[0-9a-f]+)?|{re.escape(RESUME)}{_PARTIAL}|{CHECKPOINTS}")
_OF_CHECKPOINTS = re.compile(rf"step-\d+\.pt{_PARTIAL}|\.snakemake_timestamp")

log = logging.getLogger(__name__)


class Mismatch(Exception):
    """What lies in the state folder cannot be continued; the message says why."""


class State:
    """A run's state folder, held by its lock. ``key`` says which run it is: no other's state is continued."""

    def __init__(self, path: Path, key: str, held: lock.Lock):
        self.path, self.key, self.held = path, key, held
        self.checkpoints: dict[str, str] = {}
        """Digest of each checkpoint that belongs to the run so far, by its file's name."""
        self.devices: list[str] = []
        """Where the run has computed, in order."""

    def save_checkpoint(self, step: int, value: Mapping[str, Any]) -> None:
        """Save ``checkpoints/step-{step}.pt``."""
        self.held.check()
        name = f"step-{step}.pt"
        self.checkpoints[name] = tensor_file.write(self.path / CHECKPOINTS / name, dict(value))

    def save(self, state: FitState, model: torch.nn.Module, optimizer: ModelOptimizer) -> None:
        """Save all that a later process needs to continue from here."""
        self.held.check()
        rows = [{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in state.rows]
        progress = {**vars(state), "rows": rows}
        saved = {"key": self.key, "progress": progress, "checkpoints": self.checkpoints, "devices": self.devices}
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        tensor_file.write(self.path / RESUME, {**saved, **tensors})

    def restore(self, model: torch.nn.Module, optimizer: ModelOptimizer, device: torch.device) -> FitState | None:
        """Continue what lies here, if it is this run's and whole; else clear it, and say why in one line.

        After None the model and the optimiser may have been written to, and are to be made anew.
        """
        try:
            saved = self._read(device)
            try:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                state = FitState(**saved["progress"])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise Mismatch(f"{RESUME} does not fit this network and optimiser ({type(error).__name__})") from error
        except FileNotFoundError:
            self.clear()
            return None
        except (Mismatch, files.DamagedFile) as error:
            log.warning("%s: %s; the run starts afresh", self.path, " ".join(str(error).split()))
            self.clear()
            return None
        self.checkpoints, self.devices = dict(saved["checkpoints"]), list(saved["devices"])
        return state

    def _read(self, device: torch.device) -> dict[str, Any]:
        saved = tensor_file.read(self.path / RESUME, device)
        if not isinstance(saved, dict) or not {"checkpoints", "devices"} <= saved.keys():
            raise Mismatch(f"{RESUME} is no run's state")
        if saved.get("key") != self.key:
            raise Mismatch("what lies there has other settings, code, data or torch")
        if bad := files.differing(self.path / CHECKPOINTS, saved["checkpoints"]):
            raise Mismatch(f"its checkpoint {bad[0]}")
        return saved

    def publish(self, out: Path, record: Mapping[str, Any], metrics: bytes) -> None:
        """Put the run in its place, the record last: its presence says that the run is whole. The state stays.

        Every step can be done again, whatever was there before.
        """
        self.held.check()
        files.remove(out / RECORD)
        _remove_checkpoints(out / CHECKPOINTS)
        with files.writing(out):
            (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for name in self.checkpoints:
            files.link(self.path / CHECKPOINTS / name, out / CHECKPOINTS / name)
        files.write(out / METRICS, metrics)
        outputs = [out / METRICS, *(out / CHECKPOINTS / name for name in self.checkpoints)]
        if bad := files.differing(out / CHECKPOINTS, self.checkpoints):
            raise files.DamagedFile(f"{self.path}: of the checkpoints, {bad[0]}; run the same command again")
        self.held.check()
        files.write_record(out / RECORD, record, outputs)

    def clear(self) -> None:
        """Remove the state: first what makes it one, so that half of it is never continued."""
        files.remove(self.path / RESUME)
        _remove_checkpoints(self.path / CHECKPOINTS)
        files.remove(self.path / f"{RESUME}.partial")
        self.checkpoints, self.devices = {}, []


def require_state(path: Path, out: Path) -> None:
    """Refuse a state folder that is the run's own or holds anything else than a run's state: it would be cleared."""
    if path.resolve() == out.resolve():
        raise UserError(f"the state of an unfinished run cannot lie in the run's own folder {out}; name another one")
    _require_names(path, _OF_STATE, "which is no part of an unfinished run; name a folder of its own for the state")
    _require_names(path / CHECKPOINTS, _OF_CHECKPOINTS, "which is no checkpoint of a run; name another state folder")


def require_free(out: Path, unfinished: Path) -> None:
    """Refuse a run's folder in which files of another origin stand under the names of a run's.

    Without a record they are this run's where its state still lies in ``unfinished``: it was ended while it published.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder, and a run's outputs need one; move it away, or name another")
    _require_names(
        out / CHECKPOINTS, _OF_CHECKPOINTS, "which is no checkpoint of a run; move it away, or name another folder"
    )
    if (out / RECORD).exists():
        try:
            known = {"spec", "outputs"} <= files.read_record(out / RECORD).keys()
        except (files.DamagedFile, OSError):
            known = False
        if not known:
            raise UserError(
                f"{out / RECORD} is no record of a run, or was altered; move it away, or name another folder"
            )
    elif not (unfinished / RESUME).is_file():
        names = [METRICS, *(f"{CHECKPOINTS}/{name}" for name in _names(out / CHECKPOINTS) if name.startswith("step-"))]
        if found := [name for name in names if (out / name).exists()]:
            raise UserError(
                f"{out / found[0]} stands there without a record ({RECORD}) that says which run's it is, and would be "
                "replaced; move it away, or name another folder"
            )


def _require_names(folder: Path, own: re.Pattern[str], why: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} cannot be written: it is no folder")
    if foreign := [name for name in _names(folder) if not own.fullmatch(name)]:
        raise UserError(f"{folder} holds {foreign[0]}, {why}")


def _remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints, and the folder if nothing else is in it."""
    for name in _names(folder):
        if _OF_CHECKPOINTS.fullmatch(name):
            files.remove(folder / name)
    with suppress(OSError):
        folder.rmdir()


def _names(folder: Path) -> Iterator[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from sorted(entry.name for entry in folder.iterdir())
