"""A finished run as its directory holds it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from curvspace import datasets, files, models
from curvspace.datasets import DataSet
from curvspace.errors import UserError
from curvspace.seeds import derived_seed, replayed_randomness
from curvspace.training import tensor_file
from curvspace.training.spec import Block

_AGAIN = "remove the run's folder and train it again"


class RunRecord:
    """``metrics.csv``, ``run.json`` and ``checkpoints/step-{n}.pt`` of one run.

    What is read is compared with the digests in ``run.json`` first.

    Raises
    ------
    FileNotFoundError
        If the directory holds no finished run, or a file of it is not there.
    files.DamagedFile
        If a file is not what was written, or the run was written by a version without digests.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "run.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no finished run (run.json is missing); train it first")
        self.record: dict[str, Any] = files.read_record(self.path / "run.json")
        """All that ``run.json`` says: the job, its code, devices, versions, the status and the outputs."""
        if "spec" not in self.record or "outputs" not in self.record:
            raise files.DamagedFile(f"{self.path / 'run.json'} is no record of a training run")
        self.spec: dict[str, Any] = self.record["spec"]
        self.status: str = self.record["status"]
        self.outputs: dict[str, str] = self.record["outputs"]
        """SHA-256 of each file of the run by its name below :attr:`path`."""

    def damage(self) -> list[str]:
        """One phrase for each file that is missing or was altered; empty if the run is whole."""
        return files.differing(self.path, self.outputs)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a step; see :mod:`curvspace.training.loop`."""
        file = self.path / "metrics.csv"
        if bad := files.differing(self.path, {file.name: self.outputs[file.name]}):
            raise files.DamagedFile(f"{self.path}: {bad[0]}; {_AGAIN}")
        return pd.read_csv(io.BytesIO(file.read_bytes()))

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that name this run in tidy tables."""
        names = {key: self.spec[key]["name"] for key in ("dataset", "model", "optimizer")}
        return {**names, **{key: self.spec[key] for key in ("batch_size", "lr", "seed")}}

    @property
    def steps(self) -> list[int]:
        """Steps at which checkpoints were saved, ascending."""
        found = (re.fullmatch(r"checkpoints/step-(\d+)\.pt", name) for name in self.outputs)
        return sorted(int(match[1]) for match in found if match)

    def checkpoint(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The saved state after ``step`` steps: model, optimizer, step, seed."""
        name = f"checkpoints/step-{step}.pt"
        if name not in self.outputs:
            raise FileNotFoundError(f"no checkpoint at step {step} in {self.path}; there are {self.steps}")
        try:
            return tensor_file.read(self.path / name, device, self.outputs[name])
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path / name} has been removed; {_AGAIN}") from None
        except files.DamagedFile as error:
            raise files.DamagedFile(f"{error}; {_AGAIN}") from None

    def dataset(self, data_dir: str | Path) -> DataSet:
        """The run's data set (its variant: subset, labels) from the prepared arrays in ``data_dir``."""
        return datasets.load(data_dir, data_options(self.spec["dataset"]))

    def build_model(self, data: DataSet) -> nn.Module:
        """A fresh model of this run's kind, with its initial weights (the run's seed)."""
        return initial_model(self.spec["model"], data, self.spec["seed"])

    def model(self, step: int, data: DataSet, device: torch.device | str = "cpu") -> nn.Module:
        """The network as it was after ``step`` steps, in eval mode."""
        model = self.build_model(data).to(device)
        model.load_state_dict(self.checkpoint(step, device)["model"])
        return model.eval()


def data_options(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`curvspace.datasets.load` is asked for by a ``datasets`` block of the config: all but its name."""
    return {key: value for key, value in dataset.items() if key != "name"}


def initial_model(options: Mapping[str, Any], data: DataSet, seed: int) -> nn.Module:
    """The model of a config block on the CPU, initialised from ``seed`` alone; the generators are left as they were."""
    block = Block.of(options)
    with replayed_randomness(torch.device("cpu"), derived_seed(seed, "init")):
        model = models.build(block.kind, block.options, data.input_shape, data.num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model kind {block.kind!r} returned {type(model).__name__}; a torch.nn.Module is wanted")
    return model
