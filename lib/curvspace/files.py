"""Files that a reader finds whole or not at all, and the digests by which damage is seen.

Every record (``run.json``, ``card.json``) carries a checksum of all that it says; what a record speaks of is listed in
it with the SHA-256 of each file. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from curvspace.errors import UserError

CHECKSUM = "checksum"
"""The key of a record's checksum over all its other keys."""


class DamagedFile(UserError):
    """A file is not what was written: truncated, altered, or of another program."""


class CannotWrite(UserError):
    """The disk is full, the folder is read-only, or the like; what was there before is as it was."""


def write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, on the disk when this returns.

    Raises
    ------
    CannotWrite
        With the reason; the file is then as it was before.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no such names."""
    with writing(target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it, if it is there."""
    with writing(path), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The system's refusals as one line that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotWrite(f"{path} cannot be written: {reason}; mend that and run the same command again") from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name below ``folder``: the ``outputs`` of a record."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(paths)}


def differing(folder: Path, outputs: Mapping[str, str]) -> list[str]:
    """One phrase for each output that is missing or is not what was written."""
    found = []
    for name, expected in outputs.items():
        try:
            if digest(folder / name) != expected:
                found.append(f"{name} was altered")
        except OSError:
            found.append(f"{name} is missing")
    return found


def check(path: Path, record: Path) -> None:
    """Compare a file with the record that lists it, where there is one.

    Raises
    ------
    DamagedFile
        If the file, or the record, is not what was written.
    """
    if not record.is_file():
        return
    name = path.relative_to(record.parent).as_posix()
    expected = read_record(record).get("outputs", {}).get(name)
    if expected and (bad := differing(record.parent, {name: expected})):
        raise DamagedFile(f"{record.parent}: {bad[0]} since its job wrote it; delete it and run the study again")


def write_record(
    path: Path, record: Mapping[str, Any], outputs: Iterable[Path] = (), made_from: Mapping[Path, str] | None = None
) -> None:
    """Write a record with its checksum and, where there are any, the digests of the outputs beside or below it.

    ``made_from``: the digests of what was read, which are listed by the way there from the record's folder.
    """
    listed = {
        "outputs": digests(path.parent, outputs),
        "made_from": {Path(os.path.relpath(file, path.parent)).as_posix(): d for file, d in (made_from or {}).items()},
    }
    filled = {key: value for key, value in listed.items() if value}
    values = json.loads(json.dumps({**record, **filled}, default=list))
    text = json.dumps({**values, CHECKSUM: _checksum(values)}, indent=2, sort_keys=True)
    write(path, f"{text}\n".encode())


def read_record(path: Path) -> dict[str, Any]:
    """What a record says, without its checksum.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    DamagedFile
        If it is not what was written, or was written before records had checksums.
    """
    data = path.read_bytes()
    try:
        record = json.loads(data)
        given = record.pop(CHECKSUM, None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is no JSON object; make it again") from None
    if given is None:
        raise DamagedFile(f"{path} has no checksum: an earlier version wrote it; make it again")
    if given != _checksum(record):
        raise DamagedFile(f"{path} was altered since it was written: its checksum differs; make it again")
    return record


def _checksum(values: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
