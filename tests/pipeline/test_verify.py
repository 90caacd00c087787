"""Verification on made-up records, and how presets are laid over the config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from curvspace.cli.common import provenance
from workflow import settings, verify


@dataclass
class Job:
    name: str
    record: str
    spec: dict[str, Any]
    code: str = "new"
    stage: str = "train"

    @property
    def params(self) -> dict[str, str]:
        return {"spec": json.dumps(self.spec), "code": self.code}


def test_verify_tells_current_stale_and_missing_results(tmp_path):
    def record(name: str, **values: Any) -> None:
        (tmp_path / name).write_text(json.dumps({**provenance({"lr": 0.1, "task": {"epochs": 2}}, "new"), **values}))

    record("good.json")
    record("good2.json")
    record("settings.json", job={"lr": 0.2, "task": {"epochs": 2}})
    record("code.json", code="old")
    record("torch.json", versions={"torch": "1.0"})
    (tmp_path / "broken.json").write_text("{")
    names = ("good", "good2", "settings", "code", "torch", "broken", "absent")
    jobs = [Job(name, f"{name}.json", {"task": {"epochs": 2}, "lr": 0.1}) for name in names]
    found = {name.split()[1]: (state, why) for state, name, why in verify.compare(iter(jobs), tmp_path)}
    assert found["good"] == ("current", "")
    assert found["settings"] == ("stale", "settings differ in lr")
    assert found["code"] == ("stale", "the code has changed")
    assert found["torch"][0] == "stale"
    assert "torch 1.0" in found["torch"][1]
    assert found["broken"][0] == "stale"
    assert found["absent"] == ("missing", "absent.json is not there")


def test_presets_are_laid_over_as_snakemake_does(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {y: 1, z: [1, 2]}\nw: 1\n")
    (tmp_path / "b.yaml").write_text("x: {z: [3]}\n")
    ours = settings.files([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert ours == {"x": {"y": 1, "z": [3]}, "w": 1}
    snakemake = pytest.importorskip("snakemake.utils")
    theirs = {"x": {"y": 1, "z": [1, 2]}, "w": 1}
    snakemake.update_config(theirs, {"x": {"z": [3]}})
    assert ours == theirs
