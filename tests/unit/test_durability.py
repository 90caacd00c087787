"""Whatever ends a run, and wherever, the same command ends with the run that an unbroken one leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from curvspace.datasets.store import Arrays, make_card, save
from curvspace.errors import UserError
from curvspace.files import CannotWrite, DamagedFile
from curvspace.training import lock, run, tensor_file
from curvspace.training.record import RunRecord
from curvspace.training.run import train
from curvspace.training.spec import RunSpec
from tests.unit import faults

STEPS = 4


def tiny_spec(**changes) -> RunSpec:
    values = {
        "dataset": {"name": "tiny", "source": "tiny", "validation": 6, "subset_seed": 0},
        "model": {"name": "fc", "kind": "fc", "widths": [3]},
        "optimizer": {"name": "sgd", "kind": "sgd", "momentum": 0.9},
        "task": {"epochs": 2, "checkpoints": [0, 1]},
        "batch_size": 9,
        "lr": 0.1,
        **changes,
    }
    return RunSpec.from_dict(values)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (24, 1, 3, 3), dtype=np.uint8)
    arrays = Arrays(inputs, np.arange(24) % 3, inputs[:6], np.arange(6) % 3, num_classes=3)
    save(tmp_path / "tiny", arrays, make_card("tiny", arrays, "made here", {}))
    return tmp_path / "tiny"


@pytest.fixture
def training(tiny_data: Path, tmp_path: Path) -> Callable[..., Callable[[], RunRecord]]:
    """A training that saves its state after every step, into a folder of a given name."""

    def into(name: str, lr: float = 0.1, state: str = "", overwrite: bool = False) -> Callable[[], RunRecord]:
        folders = (tmp_path / name, tmp_path / state if state else None)
        return lambda: train(
            tiny_spec(lr=lr), tiny_data, *folders, save_every_s=-1, progress=False, overwrite=overwrite
        )

    return into


def assert_same_run(found: RunRecord, whole: RunRecord) -> None:
    assert found.damage() == []
    assert sorted(found.outputs) == sorted(whole.outputs)
    a, b = (record.metrics.drop(columns=["wall_s", "seconds"]) for record in (found, whole))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    for step in whole.steps:
        first, second = found.checkpoint(step), whole.checkpoint(step)
        assert all(torch.equal(first["model"][name], value) for name, value in second["model"].items())
        assert str(first["optimizer"]["state"]) == str(second["optimizer"]["state"])


EVERY = 8
"""A fault strikes at every line in so many, for the time it takes; with ``CURVSPACE_EVERY_LINE`` set, at all."""


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_run_struck_at_any_line_is_done_again_to_the_same_end(fault, training, tmp_path, monkeypatch):
    """Snakemake deletes the outputs of a job that failed, a person does not: by turns."""
    monkeypatch.setattr(lock, "STALE_S", 0.2)
    monkeypatch.setattr(lock, "POLL_S", 0.05)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # what a process leaves, not what a machine does
    whole = training("whole")()
    every = 1 if os.environ.get("CURVSPACE_EVERY_LINE") else EVERY
    moments = list(faults.moments(faults.lines(training("counted"))))[::every]
    for turn, (line, pass_) in enumerate(moments):
        status = faults.struck(training("struck"), faults.FAULTS[fault], line, pass_)
        if status != 0 and turn % 2:
            shutil.rmtree(tmp_path / "struck", ignore_errors=True)
        where = f"{fault} at {Path(line[0]).name}:{line[1]}, pass {pass_}, status {status}"
        assert faults.in_process(training("struck")) == 0, where
        assert_same_run(RunRecord(tmp_path / "struck"), whole)
        assert faults.folder_of(tmp_path / "struck.state") == [], where
        assert not (tmp_path / "struck.state").exists(), where
        shutil.rmtree(tmp_path / "struck")
    assert len(moments) > 300 / every / 2


def test_a_disk_that_is_full_at_any_byte_is_said_in_one_line_and_the_run_is_done_again(training, tmp_path):
    whole = training("whole")()
    largest = max(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
    failed = 0

    def refused() -> None:
        with pytest.raises(CannotWrite, match="cannot be written") as error:
            training("full")()
        assert len(str(error.value).splitlines()) == 1

    for size in range(0, 3 * largest, largest // 10):
        limit = (resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        failed += faults.in_process(refused, before=lambda limit=limit: resource.setrlimit(*limit)) == 0
        assert faults.in_process(training("full")) == 0
        assert_same_run(RunRecord(tmp_path / "full"), whole)
        shutil.rmtree(tmp_path / "full")
    assert failed >= 10


# --- damaged files --------------------------------------------------------------------------------------------------


def flipped(file: Path, place: float, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def interrupted(training, tmp_path: Path, name: str = "broken") -> Path:
    """The state folder of a run that stopped at its third step."""
    passed = faults.lines(training("counted"))
    saving = next(line for line in passed if line[0].endswith("state.py") and "tensors =" in _source(line))
    assert faults.struck(training(name), faults.kill, saving, 3) == -9
    assert (tmp_path / f"{name}.state" / "resume.pt").is_file()
    return tmp_path / f"{name}.state"


def _source(line: faults.Line) -> str:
    return Path(line[0]).read_text().splitlines()[line[1] - 1]


def _foreign(file: Path) -> None:
    torch.save({"key": "another", "progress": {}, "model": {}, "optimizer": {}}, file)


def _wrong_shape(file: Path) -> None:
    saved = tensor_file.read(file)
    saved["model"] = {name: torch.zeros(7) for name in saved["model"]}
    tensor_file.write(file, saved)


def _without(key: str) -> Callable[[Path], None]:
    def drop(file: Path) -> None:
        saved = tensor_file.read(file)
        del saved[key]
        tensor_file.write(file, saved)

    return drop


STATE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    **{f"cut at {n}": lambda file, n=n: file.write_bytes(file.read_bytes()[:n]) for n in (1, 80, 500, -1, -70, -100)},
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "text": lambda file: file.write_text("not a state"),
    "foreign": _foreign,
    "wrong shape": _wrong_shape,
    **{f"without {key}": _without(key) for key in ("key", "progress", "checkpoints", "model", "optimizer", "devices")},
    **{f"bit {i} flipped": lambda file, i=i: flipped(file, i / 19, i % 8) for i in range(20)},
    "checkpoint deleted": lambda file: (file.parent / "checkpoints" / "step-1.pt").unlink(),
    "checkpoint flipped": lambda file: flipped(file.parent / "checkpoints" / "step-0.pt", 0.5),
    "checkpoint swapped": lambda file: shutil.copy(*((file.parent / "checkpoints" / f"step-{n}.pt") for n in (0, 1))),
}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_a_damaged_state_is_said_in_one_line_and_the_run_starts_afresh(damage, training, tmp_path, caplog):
    whole = training("whole")()
    state = interrupted(training, tmp_path)
    STATE_DAMAGE[damage](state / "resume.pt")
    again = training("broken")()
    assert_same_run(again, whole)
    (said,) = caplog.messages
    assert "starts afresh" in said
    assert str(state) in said
    assert len(said.splitlines()) == 1


def test_a_whole_state_is_continued_in_silence(training, tmp_path, caplog, monkeypatch):
    whole = training("whole")()
    interrupted(training, tmp_path)
    seen = []
    real = run.fit
    monkeypatch.setattr(run, "fit", lambda *a, **k: (seen.append(k["state"].step), real(*a, **k))[1])
    assert_same_run(training("broken")(), whole)
    assert seen == [1]
    assert caplog.messages == []


def test_a_run_that_stands_whole_is_not_trained_again(training, tmp_path):
    training("run")()
    stamp = (tmp_path / "run" / "run.json").stat().st_mtime_ns
    training("run")()
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns == stamp
    flipped(tmp_path / "run" / "checkpoints" / "step-1.pt", 0.4)
    assert_same_run(training("run")(), training("whole")())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        *("run/run.json", "run/metrics.csv", "run/checkpoints/my_best.pt", "run/checkpoints/step-4.pt", "run"),
        *("run.state/notes.txt", "run.state/checkpoints/best.pt", "run.state/sub/a", "run.state"),
    ],
)
def test_nothing_of_anothers_is_lost(name, training, tmp_path):
    """Files of another origin in the run's folder or in that of its state."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match=file.name) as error:
        training("run")()
    assert len(str(error.value).splitlines()) == 1
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert not (tmp_path / "run" / "run.json").exists() or name == "run/run.json"


def test_a_state_in_the_runs_own_folder_is_refused(training):
    with pytest.raises(UserError, match="own folder"):
        training("run", state="run")()


def test_a_finished_run_of_other_settings_is_replaced_only_when_asked(training, tmp_path):
    whole = training("run")().record["key"]
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run holds a finished run of other settings.*--overwrite"):
        training("run", lr=0.2)()
    assert {**before, "notes.txt": b"mine"} == contents(tmp_path / "run")
    replaced = training("run", lr=0.2, overwrite=True)()
    assert replaced.spec["lr"] == 0.2
    assert replaced.record["key"] != whole
    assert not replaced.damage()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


RUN_DAMAGE = ["checkpoints/step-0.pt", "checkpoints/step-4.pt", "metrics.csv", "run.json"]


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "deleted", "replaced by another"])
@pytest.mark.parametrize("name", RUN_DAMAGE)
def test_a_damaged_run_is_an_error_of_one_line_that_names_the_file(name, how, training, tmp_path):
    training("run")()
    file = tmp_path / "run" / name
    other = tmp_path / "run" / "checkpoints" / "step-1.pt"
    match how:
        case "flipped":
            flipped(file, 0.6)
        case "cut":
            file.write_bytes(file.read_bytes()[:-3])
        case "empty":
            file.write_bytes(b"")
        case "deleted":
            file.unlink()
        case _:
            shutil.copy(other, file)

    def read() -> None:
        record = RunRecord(tmp_path / "run")
        assert record.damage() == [f"{name} is missing" if how == "deleted" else f"{name} was altered"]
        _ = record.metrics
        for step in (0, 1, 4):
            record.checkpoint(step)

    with pytest.raises((DamagedFile, FileNotFoundError)) as error:
        read()
    assert len(str(error.value).splitlines()) == 1
    assert file.name in str(error.value)
    assert "again" in str(error.value) or "train it first" in str(error.value)


def test_a_flipped_checkpoint_is_no_networks_weights(training, tmp_path):
    """A checkpoint that is named as a file, without its run."""
    from curvspace.cli.loading import load_weights

    model = training("run")().build_model(RunRecord(tmp_path / "run").dataset(tmp_path / "tiny"))
    file = tmp_path / "run" / "checkpoints" / "step-1.pt"
    load_weights(model, file)
    whole = file.read_bytes()
    for place in range(12):
        file.write_bytes(whole)
        flipped(file, place / 12, place % 8)
        with pytest.raises(UserError, match=r"step-1\.pt"):
            load_weights(model, file)


def test_a_run_of_an_earlier_version_is_refused_in_one_line(training, tmp_path):
    training("run")()
    file = tmp_path / "run" / "run.json"
    old = json.loads(file.read_text())
    del old["checksum"]
    file.write_text(json.dumps(old))
    with pytest.raises(DamagedFile, match="earlier version"):
        RunRecord(tmp_path / "run")


def test_other_data_does_not_continue_a_state(training, tmp_path, caplog):
    interrupted(training, tmp_path)
    random = np.random.default_rng(1)
    inputs = random.integers(0, 256, (24, 1, 3, 3), dtype=np.uint8)
    arrays = Arrays(inputs, np.arange(24) % 3, inputs[:6], np.arange(6) % 3, num_classes=3)
    save(tmp_path / "tiny", arrays, make_card("tiny", arrays, "made here", {}))
    training("broken")()
    assert "other settings, code, data" in caplog.text


def test_of_many_trainers_of_one_run_none_spoils_it_even_when_some_are_killed(training, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    whole = training("whole")()
    for attempt in range(4):
        name = f"run{attempt}"
        children = []
        for number in range(5):
            if (pid := os.fork()) == 0:
                os._exit(faults.in_process(training(name)) if number else _held_up(training(name)))
            children.append(pid)
        time.sleep(0.05 * attempt)
        os.kill(children[attempt % 2], signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert ends.count(0) >= 4
        wait_until_free(tmp_path / f"{name}.state")
        assert_same_run(RunRecord(tmp_path / name), whole)


def _held_up(action: Callable[[], object]) -> int:
    """The action by a process that stops for a moment at each of its writes."""
    real = os.replace
    os.replace = lambda *names: (time.sleep(0.02), real(*names))[1]
    return faults.in_process(action)


def wait_until_free(state: Path) -> None:
    deadline = time.monotonic() + 20
    while state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists()


def test_a_read_only_folder_is_said_in_one_line(training, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written") as error:
        training("file/run")()
    assert len(str(error.value).splitlines()) == 1
