"""Where the rows of a monitor go: a CSV file, TensorBoard, Weights & Biases, or an object of the user's own."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

Row = Mapping[str, float]


class Sink(Protocol):
    """Takes one row a measurement. Anything with these two methods will do."""

    def write(self, row: Row) -> None:
        """One measurement: column -> number, ``step`` among them; NaN where something was not measured."""

    def close(self) -> None:
        """No more rows will come."""


class CSVSink:
    """One line a measurement in a CSV file, written at once, so that a run that dies loses nothing.

    Parameters
    ----------
    path
        The file; its folder is made.
    append
        Continue a file that is there (a resumed run); its columns must be the same. Half a line at its end, of a
        process that was killed, is dropped. Rows beyond the step from which the run is resumed stay, and come again.

    Raises
    ------
    ValueError
        If the file is there and ``append`` is False, or its columns are others.
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False):
        self.path = Path(path)
        self.columns: list[str] | None = None
        if self._begun():
            if not append:
                self._refuse()
            self._drop_half_a_line()
            with self.path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), None)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        new = self.columns is None
        if new and self._begun():
            self._refuse()
        if self.columns is not None and list(row) != self.columns:
            other = sorted(set(row) ^ set(self.columns)) or "their order"
            raise ValueError(f"{self.path} has other columns than this monitor: {other}; write to another file")
        before = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([list(row), row.values()] if new else [row.values()])
        except OSError:  # a full disk: the next row must not go on where this one broke off
            with suppress(OSError):
                os.truncate(self.path, before)
            raise
        self.columns = list(row)

    def close(self) -> None:
        pass

    def _begun(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > 0

    def _drop_half_a_line(self) -> None:
        with self.path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.path} is there already; name another file, or continue it with append=True")


class TensorBoardSink:
    """Scalars ``curvature/<column>`` over steps.

    Parameters
    ----------
    log_dir
        Folder of the event files, or an open ``SummaryWriter`` (which stays open at the end).
    """

    def __init__(self, log_dir: Any):
        self._owned = isinstance(log_dir, str | os.PathLike)
        if self._owned:
            from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

            log_dir = SummaryWriter(os.fspath(log_dir))
        self.writer = log_dir

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self.writer.add_scalar(f"curvature/{name}", value, int(row["step"]))
        self.writer.flush()

    def close(self) -> None:
        if self._owned:
            self.writer.close()


class WandbSink:
    """Metrics ``curvature/<column>`` against ``curvature/step``, whatever else the run logs.

    Parameters
    ----------
    run
        A run that was started already (which stays open at the end). Default: the present one, else a new one.
    mode, options
        Of the new run: ``wandb.init(mode=mode, **options)``. Offline by default: nothing leaves this machine.
    """

    def __init__(self, run: Any = None, *, mode: str = "offline", **options: Any):
        import wandb

        given: Any = run or wandb.run
        self._owned = given is None
        self.run: Any = wandb.init(mode=mode, **options) if given is None else given  # type: ignore[arg-type]
        self.run.define_metric("curvature/*", step_metric="curvature/step")

    def write(self, row: Row) -> None:
        self.run.log({f"curvature/{name}": value for name, value in row.items() if not math.isnan(value)})

    def close(self) -> None:
        if self._owned:
            self.run.finish()


def as_sinks(to: str | os.PathLike[str] | Sink | Iterable[str | os.PathLike[str] | Sink] | None) -> list[Sink]:
    """A path is a CSV file; a sink is itself; a list may hold several of either.

    Raises
    ------
    ValueError
        For anything else.
    """
    if to is None:
        return []
    if isinstance(to, str | os.PathLike):
        return [CSVSink(to)]
    if hasattr(to, "write") and hasattr(to, "close"):
        return [to]  # type: ignore[list-item]
    if isinstance(to, Iterable):
        return [sink for one in to for sink in as_sinks(one)]
    raise ValueError(f"to must be a path of a CSV file, a sink (write(row), close()) or a list of these, got {to!r}")
