"""A finished run as its directory holds it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from curvspace import datasets, models
from curvspace.datasets import DataSet


class RunRecord:
    """``metrics.csv``, ``run.json`` and ``checkpoints/step-{n}.pt`` of one run.

    Raises ``FileNotFoundError`` where the directory holds no finished run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "run.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no finished run (run.json is missing); train it first")
        self._record: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        self.spec: dict[str, Any] = self._record["spec"]
        self.status: str = self._record["status"]

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a step; see :mod:`curvspace.training.loop`."""
        return pd.read_csv(self.path / "metrics.csv")

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that name this run in tidy tables."""
        names = {key: self.spec[key]["name"] for key in ("dataset", "model", "optimizer")}
        return {**names, **{key: self.spec[key] for key in ("batch_size", "lr", "seed")}}

    @property
    def steps(self) -> list[int]:
        """Steps at which checkpoints were saved, ascending."""
        return sorted(int(p.stem.removeprefix("step-")) for p in (self.path / "checkpoints").glob("step-*.pt"))

    def checkpoint(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The saved state after ``step`` steps: model, optimizer, step, seed."""
        file = self.path / "checkpoints" / f"step-{step}.pt"
        if not file.is_file():
            raise FileNotFoundError(f"no checkpoint at step {step} in {self.path}; there are {self.steps}")
        return torch.load(file, map_location=device, weights_only=True)

    def dataset(self, data_dir: str | Path) -> DataSet:
        """The run's data set (its variant: subset, labels) from the prepared arrays in ``data_dir``."""
        options = {k: v for k, v in self.spec["dataset"].items() if k != "name"}
        return datasets.load(data_dir, options)

    def build_model(self, data: DataSet) -> nn.Module:
        """A fresh model of this run's kind, with its initial weights (the run's seed)."""
        return initial_model(self.spec["model"], data, self.spec["seed"])

    def model(self, step: int, data: DataSet, device: torch.device | str = "cpu") -> nn.Module:
        """The network as it was after ``step`` steps, in eval mode."""
        model = self.build_model(data).to(device)
        model.load_state_dict(self.checkpoint(step, device)["model"])
        return model.eval()


def initial_model(options: dict[str, Any], data: DataSet, seed: int) -> nn.Module:
    """The model of a config block, initialised from ``seed`` alone; the global generator is left as it was."""
    from curvspace.training.spec import derived_seed

    rest = {k: v for k, v in options.items() if k not in ("name", "kind")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "init"))
        return models.build(options["kind"], rest, data.input_shape, data.num_classes)
