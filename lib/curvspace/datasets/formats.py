"""Decoders of the original files: IDX (MNIST), pickled batches (CIFAR), PNG sheets (CIFAR as an npm package).

Each raises :class:`WrongData` on a missing, truncated or malformed file, with the file's name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from curvspace.datasets.store import Arrays, WrongData


def candidates(root: Path, format_name: str) -> Iterator[Path]:
    """Folders at or below ``root`` that hold the first file of a format; those nearest to the root first."""
    names = MARKERS[format_name]
    found = {file.parent for file in root.rglob("*") if file.name in names and file.is_file()}
    yield from sorted(found, key=lambda folder: (len(folder.parts), folder))


def decode(folder: Path, format_name: str, num_classes: int) -> Arrays:
    """The arrays in a folder that :func:`candidates` gave.

    Raises
    ------
    WrongData
        If a file is missing, truncated or malformed.
    """
    readers: Mapping[str, Callable[[Path], tuple[NDArray[Any], ...]]] = {
        "idx": read_idx_folder,
        "cifar10": read_cifar10_folder,
        "cifar100": read_cifar100_folder,
    }
    train, train_labels, test, test_labels = readers[format_name](folder)
    return Arrays(train, train_labels, test, test_labels, num_classes)


def check_md5(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare original files with published checksums.

    Raises
    ------
    WrongData
        If a file is missing or differs.
    """
    for name, checksum in expected.items():
        if hashlib.md5(_bytes(folder / name), usedforsecurity=False).hexdigest() != checksum:
            raise WrongData(f"{folder / name} is not the original file: its MD5 differs")


def unpack(archive: Path, into: Path) -> Path:
    """Unpack the regular files of a tar file, and no links; nothing in it can land outside the folder ``into``.

    Python's own filter of members is not in 3.11.0 to 3.11.3, which Debian 12 has.

    Raises
    ------
    WrongData
        If it is truncated, no tar file, or names a place outside.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as file:
            for member in file:
                place = into / member.name
                if not place.resolve().is_relative_to(into.resolve()):
                    raise WrongData(f"{archive} names a file outside of its folder: {member.name}")
                if content := file.extractfile(member) if member.isreg() else None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with content, place.open("wb") as target:
                        shutil.copyfileobj(content, target)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise WrongData(f"{archive} cannot be unpacked: {error}") from error
    return into


# --- IDX: a magic number, the sizes (big-endian), the bytes --------------------------------------------------------

_IDX = tuple(f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def read_idx_folder(folder: Path) -> tuple[NDArray[Any], ...]:
    """Train images and labels, test images and labels of a data set in MNIST's four files, gzipped or not."""
    arrays = []
    for name in _IDX:
        file = folder / name
        array = read_idx(file if file.exists() else file.with_name(name + ".gz"))
        arrays.append(array[:, None] if array.ndim == 3 else array.astype(np.int64))
    return tuple(arrays)


def read_idx(file: Path) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes: the first two bytes are 0, then the type (8) and the number of sizes."""
    data = _bytes(file)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise WrongData(f"{file} is no IDX file of bytes")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise WrongData(f"{file} is truncated in its header")
    shape = tuple(int(n) for n in np.frombuffer(data, dtype=">u4", count=data[3], offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise WrongData(f"{file} has {len(data)} bytes where its header says {expected}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


# --- CIFAR: pickled batches ---------------------------------------------------------------------------------------


def read_cifar10_folder(folder: Path) -> tuple[NDArray[Any], ...]:
    """CIFAR-10 as six pickled batches, or as six PNG sheets with labels in JSON."""
    if (folder / "data_batch_1").exists():
        batches = [_pickled(folder / f"data_batch_{i}", "labels") for i in range(1, 6)]
        train = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
        return (*train, *_pickled(folder / "test_batch", "labels"))
    train_images = np.concatenate([read_sheet(folder / f"data_batch_{i}.png") for i in range(1, 6)])
    # The two names are misspelt in the package.
    train_labels, test_labels = (_json_labels(folder / f"{split}_lables.json") for split in ("train", "test"))
    return train_images, train_labels, read_sheet(folder / "test_batch.png"), test_labels


def read_cifar100_folder(folder: Path) -> tuple[NDArray[Any], ...]:
    """CIFAR-100's two pickled files, with the 100 fine labels."""
    return (*_pickled(folder / "train", "fine_labels"), *_pickled(folder / "test", "fine_labels"))


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays in plain containers and refuses everything else: an altered file cannot run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _pickled(file: Path, labels: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        with _opened(file) as stream:
            batch = _ArraysOnly(stream, encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        return images, np.asarray(batch[labels.encode()], dtype=np.int64)
    except WrongData:
        raise
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise WrongData(f"{file} is no batch of CIFAR images: {error}") from error


# --- CIFAR-10 as PNG sheets: one image a row, its pixels from left to right and top to bottom -----------------------


def read_sheet(file: Path) -> NDArray[np.uint8]:
    """A PNG of N rows with 1,024 RGB pixels each -> images (N, 3, 32, 32)."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise WrongData(f"{file} is missing") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports a damaged PNG as any of these
        raise WrongData(f"{file} is no readable PNG: {error}") from error
    if pixels.shape[1] != 32 * 32:
        raise WrongData(f"{file} has rows of {pixels.shape[1]} pixels, expected 1024")
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _json_labels(file: Path) -> NDArray[np.int64]:
    try:
        return np.asarray(json.loads(_bytes(file)), dtype=np.int64)
    except (ValueError, TypeError) as error:
        raise WrongData(f"{file} is no list of labels: {error}") from error


# --- files --------------------------------------------------------------------------------------------------------

MARKERS: Mapping[str, tuple[str, ...]] = {
    "idx": (_IDX[0], _IDX[0] + ".gz"),
    "cifar10": ("data_batch_1", "data_batch_1.png"),
    "cifar100": ("train",),
}
"""The files by which a folder is recognised as holding a format."""

ARCHIVES: Mapping[str, str] = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
"""The names under which the originals are distributed as one archive."""


def _opened(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except FileNotFoundError:
        raise WrongData(f"{file} is missing") from None


def _bytes(file: Path) -> bytes:
    with _opened(file) as stream:
        data = stream.read()
    if file.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise WrongData(f"{file} is truncated or no gzip file: {error}") from error
