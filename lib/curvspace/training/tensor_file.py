"""Tensors on disk with their own digest: what ``torch.save`` writes, then the SHA-256 of it.

``torch.load`` reads such a file too (it does not look beyond the end of the archive); :func:`read` compares first.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from curvspace import files

_MARK = b"\nsha256:"
_TAIL = len(_MARK) + 64


def write(path: Path, value: Any) -> str:
    """Save a value that ``torch.load(weights_only=True)`` takes; returns the digest of the whole file."""
    buffer = io.BytesIO()  # torch.save into a full disk does not say so
    torch.save(value, buffer)
    data = buffer.getvalue()
    data += _MARK + hashlib.sha256(data).hexdigest().encode()
    files.write(path, data)
    return hashlib.sha256(data).hexdigest()


def check(path: Path) -> None:
    """Raise ``DamagedFile`` where a file ends in a digest that is not the one of its contents; others pass."""
    data = path.read_bytes()
    body, tail = data[:-_TAIL], data[-_TAIL:]
    if tail.startswith(_MARK) and tail != _MARK + hashlib.sha256(body).hexdigest().encode():
        raise files.DamagedFile(f"{path} is damaged: its contents do not have the digest at its end")


def read(path: Path, device: torch.device | str = "cpu", expected: str | None = None) -> Any:
    """The value, on a device; ``expected`` is the whole file's digest where a record gives it.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    files.DamagedFile
        If any bit of it is not what was written.
    """
    data = path.read_bytes()
    body, tail = data[:-_TAIL], data[-_TAIL:]
    if tail != _MARK + hashlib.sha256(body).hexdigest().encode():
        raise files.DamagedFile(f"{path} is damaged: its contents do not have the digest at its end")
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise files.DamagedFile(f"{path} is not the file that the record beside it lists: its SHA-256 differs")
    return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
