"""Bad moments: a function run in a process of its own that is ended, or refused a write, at a chosen line."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from curvspace import files
from curvspace.training import lock, run, state, tensor_file

WATCHED = {module.__file__ for module in (files, lock, run, state, tensor_file)}
Line = tuple[str, int]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def signalled(number: int) -> Callable[[], None]:
    def send() -> None:
        os.kill(os.getpid(), number)

    return send


FAULTS: dict[str, Callable[[], None]] = {
    "kill -9": kill,
    "full disk": full_disk,
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGHUP": signalled(signal.SIGHUP),
    "Ctrl-C": signalled(signal.SIGINT),
}


def watching(visit: Callable[[Line], None]) -> Callable[[FrameType, str, Any], Any]:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            visit((frame.f_code.co_filename, frame.f_lineno))
        return trace

    return trace


def lines(action: Callable[[], Any]) -> list[Line]:
    """The lines that an action passes, in order."""
    passed: list[Line] = []
    sys.settrace(watching(passed.append))
    try:
        action()
    finally:
        sys.settrace(None)
    return passed


def moments(passed: list[Line]) -> Iterator[tuple[Line, int]]:
    """Each line at the first and at the last time that it is passed, as (line, how often it was passed by then)."""
    for line in dict.fromkeys(passed):
        yield from ((line, pass_) for pass_ in sorted({1, passed.count(line)}))


def in_process(action: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> int:
    """Exit status of a process that runs the action; minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def struck(action: Callable[[], Any], fault: Callable[[], None], line: Line, pass_: int) -> int:
    """Exit status of a process that runs the action and meets the fault at a line, when it passes it that often."""
    left = [pass_]

    def visit(passed: Line) -> None:
        if passed == line:
            left[0] -= 1
            if left[0] == 0:
                fault()

    return in_process(action, before=lambda: sys.settrace(watching(visit)))


def folder_of(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*")) if path.exists() else []
