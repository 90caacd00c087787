"""One writer for a folder, on one machine or several that share a file system.

The lock is a small file that says who holds it. Its holder touches it every ten seconds; a lock that nobody has
touched for a minute is taken over, one whose process is known to have ended at once. So it ends with its holder,
however that ends, and needs no lock service of the file system: only that a file can be created by one process alone.
Clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from curvspace import files
from curvspace.errors import UserError

NAME = "lock"
BEAT_S = 10.0
"""Seconds between signs of life."""
STALE_S = 60.0
"""A lock without a sign of life for so long is nobody's."""
POLL_S = 1.0

log = logging.getLogger(__name__)


class LockLost(UserError):
    """Another process has taken the folder over, as this one gave no sign of life; nothing more is written."""


class Lock:
    """The lock while it is held; :meth:`check` before each write."""

    def __init__(self, path: Path, token: str):
        self.path = path
        self._token = token
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def check(self) -> None:
        """Refuse to go on where the lock has been taken over (a process that stood still for a minute)."""
        if _read(self.path).get("token") != self._token:
            raise LockLost(f"{self.path.parent} was taken over by {describe(_read(self.path))}; this process stops")

    def release(self) -> None:
        """Give the folder back; it goes too, if nothing else is in it."""
        self._ended.set()
        with suppress(OSError):
            if _read(self.path).get("token") == self._token:
                self.path.unlink()
                self.path.parent.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self.path)


@contextmanager
def hold(folder: Path, stopped: Callable[[], bool] = lambda: False) -> Iterator[Lock | None]:
    """The folder's lock; waits, saying for whom in one line, while another process holds it.

    Gives None if ``stopped()`` became true meanwhile. The folder is made, and removed at the end if it is empty.
    """
    lock = _acquire(folder, stopped)
    try:
        yield lock
    finally:
        if lock:
            lock.release()


def _acquire(folder: Path, stopped: Callable[[], bool]) -> Lock | None:
    path, said = folder / NAME, ""
    seen: tuple[Any, ...] = ()
    since = time.monotonic()
    while True:
        if token := _create(path):
            return Lock(path, token)
        if stopped():
            return None
        holder, touched = _read(path), _touched(path)
        if (holder, touched) != seen:
            seen, since = (holder, touched), time.monotonic()
        if _has_ended(holder) or time.monotonic() - since > STALE_S:
            _take_away(path, holder)
            continue
        if said != (who := describe(holder)):
            log.warning("%s is in use by %s; waiting for it to end", folder, who)
            said = who
        time.sleep(POLL_S)


def describe(holder: dict[str, Any]) -> str:
    """Who holds a lock, in a few words."""
    if not holder:
        return "another process"
    pid, host, job = (holder.get(key) for key in ("pid", "host", "job"))
    stop = f"Slurm job {job}: scancel {job}" if job else f"kill {pid}"
    return f"process {pid} on {host} (to stop it: {stop})"


def _create(path: Path) -> str | None:
    """A token if the lock was free and is ours now."""
    token = secrets.token_hex(16)
    owner = {"token": token, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    owner |= {"started": _started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID")}
    with files.writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(owner))
        except (FileExistsError, FileNotFoundError):  # held; or the folder went away with its last holder
            return None
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return token


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove a lock that is nobody's. Of several who try, each finds out whether it removed that one."""
    aside = path.with_name(f"{NAME}.{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != holder:  # somebody else was faster, and holds it by now: put it back
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any]:
    """What the lock says of its holder; empty if it is not there or not written yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _touched(path: Path) -> int | None:
    """Time stamp of the last sign of life. Opened first: a network file system then asks its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and is certainly gone; False where that cannot be known from here."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    started = _started(holder.get("pid"))
    return started is not None and started != holder.get("started")


def _machine() -> str:
    """This boot of this machine and this space of process numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """When a process started, in the kernel's count: its number alone may be another's by now.

    Empty if it is gone, None if the system does not say.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:  # gone, or hidden from other users
        pass
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return ""
    except (OSError, TypeError, ValueError):
        pass
    return None
