"""What shows once networks and optimisers are built is said before the first job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import copy
from workflow import built_checks

OWN = """
from torch import nn


def one_output(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def not_on_meta(input_shape, num_classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    net[1].weight.sum().item()
    return net
"""
FIT: dict[str, Any] = {
    "stage": "train",
    "dataset": {"name": "digits", "source": "digits"},
    "model": {"name": "net", "kind": "fc", "widths": [4]},
    "optimizer": {"name": "opt", "kind": "sgd", "momentum": 0.9},
    "task": {"epochs": 1},
    "batch_size": 64,
    "lr": 0.1,
}
PARAMETERS = 65 * 4 + 5 * 10

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "data that its source alone knows": ({"dataset": {"name": "x", "source": "imagefolder", "folder": "x"}}, []),
    "images too small": ({"model": {"name": "net", "kind": "convnet"}}, ["models.net", "datasets.digits", "1×8×8"]),
    "no images": (
        {"dataset": {"name": "sine", "source": "sine"}, "model": {"name": "net", "kind": "cnn-400"}},
        ["models.net", "square images"],
    ),
    "one output for ten classes": (
        {"model": {"name": "net", "kind": "own_nets:one_output"}},
        ["models.net", "outputs of shape (34, 1)"],
    ),
    "a network that meta does not know": ({"model": {"name": "net", "kind": "own_nets:not_on_meta"}}, []),
    "an initialisation": (
        {"model": {"name": "net", "kind": "fc", "initialisation": "xavier"}},
        ["models.net", "initialisation must be one of"],
    ),
    "a batch of one pixel": (
        {
            "dataset": {"name": "digits", "source": "digits", "train": 65, "resize": 4},
            "model": {"name": "net", "kind": "own_nets:normalised"},
        },
        ["models.net", "more than 1 value"],
    ),
    "a huge network": (
        {"model": {"name": "net", "kind": "fc", "widths": [10**9]}},
        ["models.net has 75,000,000,010 parameters", "resources.train.mem_mb is 3000"],
    ),
    "momentum": ({"optimizer": {"name": "opt", "kind": "sgd", "momentum": -1.0}}, ["optimizers.opt", "momentum"]),
    "a period of 0": (
        {"optimizer": {"name": "opt", "kind": "negative-curvature", "every": 0}},
        ["optimizers.opt", "every"],
    ),
    "an unknown base": (
        {"optimizer": {"name": "opt", "kind": "negative-curvature", "base": "é"}},
        ["optimizers.opt", "base"],
    ),
    "torch's own": (
        {"optimizer": {"name": "opt", "kind": "torch.optim:NAdam", "betas": [0.9, 3.0]}},
        ["optimizers.opt", "3.0"],
    ),
    "a span larger than the network": (
        {"optimizer": {"name": "opt", "kind": "rayleigh-ritz-newton", "k": 311}},
        ["optimizers.opt.k = 311", f"at most {PARAMETERS}"],
    ),
}
OWN += """

def normalised(input_shape, num_classes):
    layers = [nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, num_classes)]
    return nn.Sequential(*layers)
"""


def said(training: dict[str, Any], **eigenpairs: int) -> list[str]:
    job = {"name": "job", "memory_mb": 3000, "trainings": [{**FIT, **training}], "eigenpairs": eigenpairs}
    return list(built_checks.problems([job]))


@pytest.mark.parametrize("name", CASES)
def test_a_network_or_optimiser_that_cannot_be_made_is_said(name, tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    change, expected = CASES[name]
    lines = said(change)
    assert len(lines) == bool(expected), lines
    assert all(part in line for line in lines for part in expected), lines
    assert not any("\n" in line for line in lines)


def test_there_are_at_most_so_many_eigenpairs_as_parameters():
    measured = {"stage": "measured"}
    assert said(measured, k=PARAMETERS) == []
    (line,) = said(measured, k=PARAMETERS + 1)
    assert line.startswith(f"measure job: k = {PARAMETERS + 1} is not allowed; allowed: at most {PARAMETERS}")


def test_no_job_starts_in_such_a_study(tmp_path: Path):
    project = copy(tmp_path / "project")
    project.edit("config.yaml", "kind: sgd, momentum: 0.9", "kind: sgd, momentum: 0, nesterov: true")
    done = project.snakemake()
    assert done.returncode == 1
    assert "config: optimizers.sgd: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((project.folder / "results").glob("runs/**/*"))
    assert not list((project.folder / "results").glob("logs/**/*.log"))
