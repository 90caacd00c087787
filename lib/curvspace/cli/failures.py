"""What ended a command, in one line: the fault, the file and line where it arose, and what to do.

The line stands last on the error stream, below the traceback where one may help; in the pipeline both are in the job's
log. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from curvspace.errors import UserError, WrongValue

OURS = [Path(__file__).parents[1], Path(__file__).parents[2] / "papers"]
LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
FULL_DISK = ("unexpected pos", "PytorchStreamWriter failed")  # torch.save's words for a write that failed
NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
LONGEST = 400


class Told(BaseException):
    """A signal to end."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}: by a person, a closed terminal or a time limit")
        self.number = number


@contextmanager
def one_line_errors(stage: str) -> Iterator[None]:
    """Whatever ends the block, as ``curvspace <stage>: …`` at the end of the error stream.

    Exit status 1, after an interrupt 130, after SIGTERM or SIGHUP 128 + its number. An error that the user can mend
    is that line alone; of any other the traceback stands above it.
    """
    try:
        with _signals_told():
            yield
    except (UserError, FileNotFoundError) as error:
        cause = error.__cause__
        if isinstance(error, WrongValue) and cause and _users(cause):  # refused by code of the user's
            with suppress(OSError):
                traceback.print_exception(cause)
            _end(stage, line(cause), 1)
        theirs = not isinstance(error, UserError) and _users(error)
        _end(stage, _with_place(str(error), error) if theirs else str(error), 1)
    except SystemExit as stop:  # ours have been told already
        if _users(stop):
            _end(stage, _with_place(f"sys.exit({stop.code!r}) was called", stop), 1)
        raise
    except (KeyboardInterrupt, Told) as stop:
        _end(stage, str(stop) or "stopped", 128 + stop.number if isinstance(stop, Told) else 130)
    except Exception as error:
        with suppress(OSError):  # the log may lie on the disk that is full
            traceback.print_exception(error)
        _end(stage, line(error), 1)


def line(error: BaseException) -> str:
    """The fault and its place in one line."""
    said = " ".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
        said = f"no memory left ({_short(said) or type(error).__name__})"
        return f"{_with_place(said, error)}; take smaller batches or fewer examples, or give the job more memory"
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return f"{_with_place(said, error)}; mend that and run the same command again"
    if any(words in said for words in FULL_DISK):
        return f"{_with_place('a file cannot be written; is the disk full?', error)} ({_short(said)})"
    name = type(error).__name__
    return _with_place(f"{name}: {_short(said)}" if said.strip() else name, error)


def place(error: BaseException) -> str | None:
    """``file:line (function)`` of the user's innermost frame; of ours where there is none of the user's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _below(frame.filename, OURS)]
    last = next(reversed(_users(error) or ours or frames), None)
    return last and f"{last.filename}:{last.lineno} ({last.name})"


def _users(error: BaseException) -> list[traceback.FrameSummary]:
    """The error's frames in files that are neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if is_users(frame.filename)]


def is_users(file: str) -> bool:
    """Whether a source file is neither ours nor a library's."""
    return not (file[0] == "<" or _below(file, OURS + LIBRARIES))


def _below(file: str, folders: list[Path]) -> bool:
    path = Path(file)
    return any(path.is_relative_to(folder) or path.resolve().is_relative_to(folder) for folder in folders)


def _with_place(said: str, error: BaseException) -> str:
    where = place(error)
    return f"{said}, at {where}" if where else said


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _end(stage: str, said: str, status: int) -> None:
    with suppress(OSError):
        print(f"curvspace {stage}: {' '.join(said.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None


@contextmanager
def _signals_told() -> Iterator[None]:
    """SIGTERM and SIGHUP as :class:`Told`, unless they were ignored (nohup) or have a handler."""

    def tell(number: int, frame: FrameType | None) -> None:
        raise Told(number)

    taken = []
    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_DFL:
            with suppress(ValueError):  # not in the main thread: the caller's business
                signal.signal(number, tell)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
