"""Prepared data sets on disk: a folder with ``arrays.npz`` and a small ``card.json``.

Nothing here knows where data comes from, so that a change to the sources leaves trained runs valid.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvspace import files
from curvspace.errors import UserError

ARRAYS, CARD = "arrays.npz", "card.json"
FIELDS = ("train_inputs", "train_targets", "test_inputs", "test_targets")


class WrongData(UserError, ValueError):
    """Arrays that are not the data set that they should be: truncated, altered or mixed up."""


@dataclass(frozen=True)
class Arrays:
    """A decoded data set.

    train_inputs, test_inputs: uint8 images (N, C, H, W), or floats (N, ...) that are used as they are.
    train_targets, test_targets: int64 classes (N,), or floats (N, 1) of a regression.
    num_classes: number of classes; number of outputs for a regression.
    """

    train_inputs: NDArray[Any]
    train_targets: NDArray[Any]
    test_inputs: NDArray[Any]
    test_targets: NDArray[Any]
    num_classes: int

    def __post_init__(self) -> None:
        for name in FIELDS:
            if not isinstance(getattr(self, name), np.ndarray):
                raise WrongData(f"{name} must be a NumPy array, got {type(getattr(self, name)).__name__}")
        _require_images(self.train_inputs)
        for split in ("train", "test"):
            inputs, targets = getattr(self, f"{split}_inputs"), getattr(self, f"{split}_targets")
            if len(inputs) != len(targets):
                raise WrongData(f"{split}: {len(inputs)} examples but {len(targets)} targets")
            classes = targets.dtype.kind in "iub" and len(targets) > 0
            if classes and not 0 <= targets.min() <= targets.max() < self.num_classes:
                raise WrongData(f"{split}: {targets.min()} … {targets.max()} are not {self.num_classes} classes")
        if self.train_inputs.shape[1:] != self.test_inputs.shape[1:]:
            raise WrongData(f"shapes differ: {self.train_inputs.shape[1:]} and {self.test_inputs.shape[1:]}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train_inputs.shape[1:])

    def digest(self) -> str:
        """SHA-256 over name, type, shape and little-endian values of the four arrays: the same from any source."""
        sha = hashlib.sha256()
        for name in FIELDS:
            array = getattr(self, name)
            array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            sha.update(array.data)
        return sha.hexdigest()


def _require_images(inputs: NDArray[Any]) -> None:
    """uint8 arrays are images, which are normalised channel by channel."""
    shape = inputs.shape
    if inputs.dtype != np.uint8:
        return
    if inputs.ndim != 4:
        raise WrongData(f"train: uint8 inputs are images (N, C, H, W), got shape {shape}; give others as floats")
    if shape[3] in (3, 4) and min(shape[1:3]) > 4:
        raise WrongData(f"train: images of shape {shape} seem to be (N, H, W, C); give (N, C, H, W)")


def channel_statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), on the scale 0 to 1.

    Exact up to the last rounding, as they follow from counts of the 256 values.
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):  # a strided channel is copied: bound the copy
            counts += np.bincount(images[start : start + 4096, channel].reshape(-1), minlength=256)
        weights = counts / counts.sum()
        mean = float(weights @ levels)
        means.append(mean)
        deviations.append(float(np.sqrt(weights @ (levels - mean) ** 2)))
    return means, deviations


def make_card(name: str, arrays: Arrays, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``card.json`` says: which data, from where, how many, and the statistics of uint8 images."""
    images = arrays.train_inputs.dtype == np.uint8
    mean, std = channel_statistics(arrays.train_inputs) if images else (None, None)
    return {
        "name": name,
        "source": source,
        "options": dict(options),
        "train": len(arrays.train_targets),
        "test": len(arrays.test_targets),
        "input_shape": list(arrays.input_shape),
        "num_classes": arrays.num_classes,
        "mean": mean,
        "std": std,
        "sha256": arrays.digest(),
    }


def require_own(folder: str | Path) -> None:
    """Nothing stands in the folder under the names of a prepared data set, or one of ours does.

    Raises
    ------
    UserError
        Where arrays, a card or a record that this package did not write would be replaced.
    """
    folder = Path(folder)
    there = [name for name in (ARRAYS, CARD, "run.json") if (folder / name).exists()]
    if there and not _has_our_arrays(folder / ARRAYS) and not _is_our_card(folder / CARD):
        raise UserError(
            f"{folder / there[0]} is no prepared data set's and would be replaced; move it away, or name another folder"
        )


def _has_our_arrays(file: Path) -> bool:
    try:
        with np.load(file, allow_pickle=False) as found:
            return set(getattr(found, "files", ())) == set(FIELDS)
    except Exception:  # a damaged archive can raise anything
        return False


def _is_our_card(file: Path) -> bool:
    try:
        return {"name", "num_classes", "sha256"} <= files.read_record(file).keys()
    except (files.DamagedFile, OSError):
        return False


def save(folder: str | Path, arrays: Arrays, card: Mapping[str, Any]) -> None:
    """Write both files, each under a temporary name first: a reader sees a whole file or none.

    The bytes depend on the contents alone (no time stamps). The card gets a checksum of all that it says.
    """
    folder = Path(folder)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            staged = Path(scratch)
            np.savez(staged / ARRAYS, **{name: getattr(arrays, name) for name in FIELDS})
            files.write_record(staged / CARD, card)
            (folder / CARD).unlink(missing_ok=True)  # so that a crash in between leaves no card beside other arrays
            os.replace(staged / ARRAYS, folder / ARRAYS)
            os.replace(staged / CARD, folder / CARD)


def load_raw(folder: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and the card of a prepared data set.

    Raises
    ------
    FileNotFoundError
        If the folder holds no prepared data set; says how to make it.
    WrongData
        If a file is truncated or altered, or the two do not belong together: the card has a checksum of its own and
        one of the arrays, and both are compared.
    """
    folder = Path(folder)
    if not ((folder / ARRAYS).is_file() and (folder / CARD).is_file()):
        raise FileNotFoundError(
            f"{folder} holds no prepared data set ({ARRAYS} and {CARD}); make it with: "
            f"python -m curvspace.cli.data {folder.name} --out {folder}"
        )
    try:
        card = files.read_record(folder / CARD)
        with np.load(folder / ARRAYS, allow_pickle=False) as file:
            arrays = Arrays(**{name: file[name] for name in FIELDS}, num_classes=card["num_classes"])
    except files.DamagedFile as error:
        raise WrongData(f"{error} (remove {folder} and prepare the data set again)") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WrongData(f"{folder} is damaged ({reason}); remove it and prepare the data set again") from error
    if arrays.digest() != card.get("sha256"):
        raise WrongData(
            f"{folder}: {ARRAYS} is not the file that {CARD} describes: their SHA-256 differ; "
            f"remove {folder} and prepare the data set again"
        )
    return arrays, card
