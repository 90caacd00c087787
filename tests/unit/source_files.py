"""Tiny data sets written in the formats in which the real ones are distributed."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from curvspace.datasets.catalogue import KNOWN, Known
from curvspace.datasets.store import Arrays

TRAIN, TEST = 20, 8


def tiny(name: str, seed: int = 0) -> tuple[Arrays, Known]:
    """Random arrays in the shape of a known data set, and what would be known about them."""
    known = KNOWN[name]
    random = np.random.default_rng(seed)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = random.integers(0, 256, (count, *known.input_shape), dtype=np.uint8)
        return images, random.integers(0, known.num_classes, count)

    arrays = Arrays(*part(TRAIN), *part(TEST), num_classes=known.num_classes)
    return arrays, replace(known, train=TRAIN, test=TEST, sha256=arrays.digest(), md5={})


def write_idx(folder: Path, arrays: Arrays, gzipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = getattr(arrays, f"{split}_inputs")[:, 0], getattr(arrays, f"{split}_targets")
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels.astype(np.uint8))):
            content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            content += array.tobytes()
            name = f"{prefix}-{name}"
            if gzipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def _dump(file: Path, images: np.ndarray, labels: np.ndarray, key: str) -> None:
    # Protocol 2 with byte strings as keys: what Python 2 wrote into the original files.
    batch = {b"data": images.reshape(len(images), -1), key.encode(): labels.tolist()}
    file.write_bytes(pickle.dumps(batch, protocol=2))


def write_cifar10(folder: Path, arrays: Arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(np.split(arrays.train_inputs, 5), np.split(arrays.train_targets, 5), strict=True)
    for index, (images, labels) in enumerate(parts, start=1):
        _dump(folder / f"data_batch_{index}", images, labels, "labels")
    _dump(folder / "test_batch", arrays.test_inputs, arrays.test_targets, "labels")


def write_cifar100(folder: Path, arrays: Arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = getattr(arrays, f"{split}_inputs"), getattr(arrays, f"{split}_targets")
        _dump(folder / split, images, labels, "fine_labels")


def write_sheets(folder: Path, arrays: Arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
    for name, images in zip(names, [*np.split(arrays.train_inputs, 5), arrays.test_inputs], strict=True):
        rows = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
        Image.fromarray(rows).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(arrays.train_targets.tolist()))
    (folder / "test_lables.json").write_text(json.dumps(arrays.test_targets.tolist()))


def write_archive(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=folder.name)


def write_image_folder(root: Path, classes: tuple[str, ...] = ("cat", "ant"), per_class: int = 3) -> None:
    """Images of one colour a class, of several sizes and modes."""
    for split in ("train", "val"):
        for label, name in enumerate(sorted(classes)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                mode, colour = ("RGB", (200 * label, 90, 40)) if index else ("L", 100 + label)
                Image.new(mode, (30 + 7 * index, 22), colour).save(folder / f"{index}.png")
