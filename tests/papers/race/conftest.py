"""A tiny data set, and two runs at constant rates on it, with checkpoints."""

from __future__ import annotations

import pytest
import torch

from curvspace.datasets import DataSet, Split
from curvspace.training.run import train
from curvspace.training.spec import RunSpec
from papers.common.context import Context


@pytest.fixture
def tiny() -> DataSet:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 4, 4, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 40), (40, 60), (40, 60))]
    return DataSet("tiny", *parts, num_classes=2, mean=None, std=None, input_shape=(1, 4, 4))


@pytest.fixture
def context(tmp_path, monkeypatch, tiny) -> Context:
    monkeypatch.setattr("curvspace.datasets.load", lambda *_: tiny)
    block = {"name": "nesterov", "kind": "sgd", "momentum": 0.9, "nesterov": True}
    runs = []
    for name, options in {"nesterov": block, "plain": {"name": "plain", "kind": "sgd"}}.items():
        spec = {"dataset": {"name": "tiny", "source": "tiny"}, "model": {"name": "softmax", "kind": "softmax"}}
        spec |= {
            "optimizer": options,
            "batch_size": 10,
            "lr": 0.1,
            "seed": 0,
            "task": {"epochs": 2, "checkpoints": [2]},
        }
        runs.append(train(RunSpec.from_dict(spec), tmp_path, tmp_path / name, progress=False))
    return Context(runs=runs, show_progress=False, _loaded={"tiny": tiny})
