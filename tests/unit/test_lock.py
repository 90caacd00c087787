"""One writer for a state folder: whoever comes second waits or takes over what a dead process left."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from curvspace.training import lock
from tests.unit import faults


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "STALE_S", 0.6)
    monkeypatch.setattr(lock, "POLL_S", 0.02)


def child(action) -> int:
    """A process that runs the action; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def hold_for_ever(folder: Path) -> None:
    with lock.hold(folder):
        time.sleep(60)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def elsewhere(**changes) -> str:
    holder = {"token": "t", "host": "node7", "machine": "another boot", "pid": os.getpid(), "started": "1", "job": None}
    return json.dumps({**holder, **changes})


def test_the_folder_is_made_and_goes_when_nothing_is_left_in_it(tmp_path):
    with lock.hold(tmp_path / "a" / "b") as held:
        held.check()
        assert faults.folder_of(tmp_path / "a") == ["b", "b/lock"]
    assert faults.folder_of(tmp_path / "a") == []
    with lock.hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert faults.folder_of(tmp_path / "a" / "b") == ["kept"]


def test_a_second_process_says_for_whom_it_waits_and_goes_on_when_that_ends(tmp_path, caplog):
    pid = child(lambda: hold_for_ever(tmp_path / "s"))
    wait_for((tmp_path / "s" / "lock").exists)
    threading.Timer(0.8, end, [pid]).start()  # longer than a lock without signs of life would last
    start = time.monotonic()
    with lock.hold(tmp_path / "s"):
        assert time.monotonic() - start > 0.7
    (said,) = caplog.messages
    assert f"in use by process {pid} on" in said
    assert f"kill {pid}" in said


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1000)
    pid = child(lambda: hold_for_ever(tmp_path / "s"))
    wait_for((tmp_path / "s" / "lock").exists)
    end(pid)
    with lock.hold(tmp_path / "s") as held:
        held.check()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", elsewhere(), elsewhere(job="31"), elsewhere(pid=None, machine="")],
    ids=["empty", "half", "no holder", "another boot", "a cluster's job", "no process"],
)
def test_a_lock_without_signs_of_life_is_taken_after_the_stated_time(tmp_path, content, caplog):
    (tmp_path / "lock").write_text(content)
    start = time.monotonic()
    with lock.hold(tmp_path) as held:
        assert 0.5 < time.monotonic() - start < 5
        held.check()
    assert len(caplog.messages) == 1
    if '"job": "31"' in content:
        assert "node7 (to stop it: Slurm job 31: scancel 31)" in caplog.text


def test_a_number_of_a_process_that_is_anothers_by_now_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1000)
    (tmp_path / "lock").write_text(elsewhere(machine=lock._machine(), started="1"))
    with lock.hold(tmp_path) as held:
        held.check()


def test_a_holder_that_stood_still_finds_out_that_it_lost_the_folder(tmp_path):
    with lock.hold(tmp_path) as first:
        first._ended.set()  # no more signs of life
        (tmp_path / "lock").write_text(json.dumps({**json.loads((tmp_path / "lock").read_text()), "machine": "x"}))
        with lock.hold(tmp_path) as second:
            second.check()
            with pytest.raises(lock.LockLost, match=f"process {os.getpid()} on"):
                first.check()
            first.release()
            second.check()


def test_waiting_ends_when_the_process_is_told_to_stop(tmp_path):
    with lock.hold(tmp_path):
        stop = time.monotonic() + 0.2
        with lock.hold(tmp_path, lambda: time.monotonic() > stop) as second:
            assert second is None
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("left", [None, elsewhere()], ids=["free", "stale"])
def test_of_many_processes_one_at_a_time_holds_the_folder(tmp_path, left):
    folder, record = tmp_path / "s", tmp_path / "record"
    if left:
        folder.mkdir()
        (folder / "lock").write_text(left)

    def work() -> None:
        with lock.hold(folder) as held:
            for word in ("in", "out"):
                held.check()
                with open(record, "a") as file:
                    file.write(f"{word} {os.getpid()}\n")
                time.sleep(0.03)

    children = [child(work) for _ in range(8)]
    for pid in children:
        os.waitpid(pid, 0)
    found = [line.split() for line in record.read_text().splitlines()]
    assert len(found) == 16
    assert [word for word, _ in found] == ["in", "out"] * 8
    assert all(a == b for (_, a), (_, b) in zip(found[::2], found[1::2], strict=True))
    assert not folder.exists()
