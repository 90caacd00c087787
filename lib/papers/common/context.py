"""What a measure is given: finished runs, prepared data sets, a device."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import nn

from curvspace import datasets
from curvspace.datasets import DataSet
from curvspace.progress import bar
from curvspace.training.record import RunRecord, data_options

T = TypeVar("T")


@dataclass
class Context:
    """The first argument of every measure ``f(context, **spec) -> DataFrame``.

    runs: the runs that the measure declared, in that order. ``settings`` are the config blocks of its data sets by
    name; ``data_dir`` is where the prepared arrays lie, one folder each (:func:`curvspace.datasets.folder_name`).
    ``scratch``: a folder for parts that are done, until the job is (None: nothing is kept); ``code``: the job's hash.
    """

    runs: list[RunRecord] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path = Path("data")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    show_progress: bool = True
    scratch: Path | None = None
    code: str = ""
    _loaded: dict[str, DataSet] = field(default_factory=dict, repr=False)

    def dataset(self, name: str | RunRecord) -> DataSet:
        """A data set by its name in the config, or that of a run; on the device, and read once.

        Raises ``KeyError`` for a name which is neither declared by the measure nor used by one of its runs.
        """
        key = name if isinstance(name, str) else name.spec["dataset"]["name"]
        if key not in self._loaded:
            known = {run.spec["dataset"]["name"]: run.spec["dataset"] for run in self.runs} | dict(self.settings)
            if key not in known:
                raise KeyError(f"the measure declares no data set {key!r}; it has {', '.join(sorted(known)) or 'none'}")
            options = data_options(known[key])
            self._loaded[key] = datasets.load(self.data_dir / datasets.folder_name(key, options), options).to(
                self.device
            )
        return self._loaded[key]

    def remembered(self, key: Mapping[str, Any], compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A part of a long measure: what an interrupted job with the same code computed for this key, or computed now.

        ``key`` says all that the part depends on, in plain values.
        """
        if self.scratch is None:
            return compute()
        name = hashlib.sha256(json.dumps([self.code, key], sort_keys=True).encode()).hexdigest()[:20]
        file = self.scratch / f"{name}.csv"
        if file.is_file():
            return pd.read_csv(file)
        table = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        table.to_csv(partial, index=False)
        os.replace(partial, file)
        return table

    def model(self, run: RunRecord, step: int) -> nn.Module:
        """The network of a run after ``step`` steps: on the device, in eval mode."""
        return run.model(step, self.dataset(run), self.device)

    def progress(self, items: Iterable[T], description: str = "", total: int | None = None) -> Iterable[T]:
        """The items, with a bar where a person watches and a line a minute elsewhere."""
        return bar(items, desc=description, total=total, show=self.show_progress)
