"""Verification on made-up records, and how presets are laid over the config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curvspace.cli.common import provenance
from curvspace.files import digest, write_record
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
    (tmp_path / "table.csv").write_text("x\n1\n")

    def record(name: str, **values: Any) -> None:
        job = {"lr": 0.1, "task": {"epochs": 2}}
        write_record(tmp_path / name, {**provenance(job, "new"), **values}, [tmp_path / "table.csv"])

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
    assert found["broken"] == ("stale", "its record is damaged")
    assert found["absent"] == ("missing", "absent.json is not there")


def by_hand(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "run.json").read_text())
        change(record)
        (folder / "run.json").write_text(json.dumps(record))

    return edit


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, ""),
    "a copy": (lambda folder: shutil.copytree(folder, folder.with_name("b")).rename(folder / "copy"), ""),
    "a table altered": (lambda folder: (folder / "table.csv").write_text("x\n2\n"), "table.csv was altered"),
    "a table with a line more": (lambda folder: (folder / "table.csv").open("a").write("3\n"), "table.csv was altered"),
    "a table deleted": (lambda folder: (folder / "table.csv").unlink(), "table.csv is missing"),
    "a checkpoint deleted": (lambda folder: (folder / "c" / "step-1.pt").unlink(), "c/step-1.pt is missing"),
    "a checkpoint flipped": (flip("c/step-0.pt"), "c/step-0.pt was altered"),
    "a checkpoint emptied": (lambda folder: (folder / "c" / "step-0.pt").write_bytes(b""), "c/step-0.pt was altered"),
    "checkpoints exchanged": (
        lambda folder: shutil.copy(folder / "c" / "step-0.pt", folder / "c" / "step-1.pt"),
        "c/step-1.pt was altered",
    ),
    "all checkpoints deleted": (lambda folder: shutil.rmtree(folder / "c"), "c/step-0.pt is missing; c/step-1.pt"),
    "arrays deleted": (lambda folder: (folder / "arrays.npz").unlink(), "arrays.npz is missing"),
    "arrays flipped": (flip("arrays.npz"), "arrays.npz was altered"),
    "a folder for a file": (
        lambda folder: ((folder / "arrays.npz").unlink(), (folder / "arrays.npz").mkdir()),
        "arrays.npz is missing",
    ),
    "a digest removed": (by_hand(lambda record: record["outputs"].pop("arrays.npz")), "its record was altered"),
    "an odd record": (by_hand(lambda record: record.update(outputs=[], versions=None, job=None)), "lists no outputs"),
    "the code forged": (by_hand(lambda record: record.update(code="newer")), "its record was altered; the code"),
    "no checksum": (by_hand(lambda record: record.pop("checksum")), "an earlier version wrote its record"),
    "the record emptied": (lambda folder: (folder / "run.json").write_bytes(b""), "its record is damaged"),
    "the record a list": (lambda folder: (folder / "run.json").write_text("[]"), "its record is damaged"),
    "the record cut": (
        lambda folder: (folder / "run.json").write_text((folder / "run.json").read_text()[:99]),
        "its record is damaged",
    ),
    "the record deleted": (lambda folder: (folder / "run.json").unlink(), "is not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_compares_what_is_there_with_what_was_written(damage, tmp_path):
    folder = tmp_path / "a"
    (folder / "c").mkdir(parents=True)
    outputs = {"table.csv": b"x\n1\n", "arrays.npz": b"0123456789", "c/step-0.pt": b"zero", "c/step-1.pt": b"one!"}
    for name, content in outputs.items():
        (folder / name).write_bytes(content)
    write_record(folder / "run.json", provenance({"lr": 0.1}, "new"), [folder / name for name in outputs])
    spoil, said = DAMAGE[damage]
    spoil(folder)
    ((state, _, why),) = verify.compare(iter([Job("a", "a/run.json", {"lr": 0.1})]), tmp_path)
    assert state == ("current" if not said else "missing" if damage == "the record deleted" else "stale")
    assert said in why
    assert len(why.splitlines()) <= 1


def test_presets_are_laid_over_as_snakemake_does(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {y: 1, z: [1, 2]}\nw: 1\n")
    (tmp_path / "b.yaml").write_text("x: {z: [3]}\n")
    ours = settings.files([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert ours == {"x": {"y": 1, "z": [3]}, "w": 1}
    snakemake = pytest.importorskip("snakemake.utils")
    theirs = {"x": {"y": 1, "z": [1, 2]}, "w": 1}
    snakemake.update_config(theirs, {"x": {"z": [3]}})
    assert ours == theirs


def test_verify_tells_what_was_made_from_a_table_or_a_run_that_has_been_made_anew(tmp_path):
    from papers.cli import table

    def measured(value: int) -> None:
        (tmp_path / "measures/a.csv").write_text(f"x\n{value}\n")
        write_record(tmp_path / "measures/a.run.json", provenance({}, "new"), [tmp_path / "measures/a.csv"])

    def trained(content: str) -> None:
        (tmp_path / "runs/r/checkpoints/step-1.pt").write_text(content)
        write_record(tmp_path / "runs/r/run.json", provenance({}, "new"), [tmp_path / "runs/r/checkpoints/step-1.pt"])

    for folder in ("measures", "tables", "runs/r/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    measured(1)
    trained("one")
    spec = {"function": f"{__name__}:as_it_is", "inputs": {"x": ["measures/a.csv"]}}
    table.make(spec, "new", tmp_path, tmp_path / "tables/t.csv")
    checkpoint = tmp_path / "runs/r/checkpoints/step-1.pt"
    write_record(tmp_path / "m.run.json", provenance({}, "new"), [], {checkpoint: digest(checkpoint)})
    jobs = [
        Job("t", "tables/t.run.json", spec, stage="table"),
        Job("a", "measures/a.run.json", {}),
        Job("r", "runs/r/run.json", {}),
        Job("m", "m.run.json", {}),
    ]

    def said() -> dict[str, str]:
        return {name.split()[1]: why for _, name, why in verify.compare(iter(jobs), tmp_path)}

    assert said() == {"t": "", "a": "", "r": "", "m": "its record lists no outputs"}
    measured(2)
    trained("two")
    found = said()
    assert found["t"] == f"{tmp_path / 'measures/a.csv'} has been made anew since"
    assert found["m"].endswith(f"; {checkpoint} has been made anew since")
    assert found["a"] == found["r"] == ""
    measured(1)
    assert said()["t"] == ""


def as_it_is(tables):
    return tables["x"]
