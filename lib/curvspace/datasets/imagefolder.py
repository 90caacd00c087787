"""A user's own images: one folder a class, as torchvision's ImageFolder has them (paper C's ImageNet-100)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curvspace.datasets.store import Arrays, WrongData
from curvspace.progress import bar

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"})
TEST_FOLDERS = ("val", "test", "validation")


def imagefolder(folder: str, size: int = 224, margin: int = 32, threads: int = 8) -> Arrays:
    """Images under ``folder/train/<class>/`` and ``folder/val/<class>/`` (or ``test``) as uint8 (N, 3, size, size).

    The shorter side is scaled to ``size + margin`` pixels, then the centre is cut out. Classes are numbered in
    alphabetical order. All images are held in memory: 100 classes of ImageNet at 224 pixels take 19 GB.

    Raises
    ------
    ValueError
        If ``size`` or ``margin`` is out of range.
    WrongData
        If the folders are missing or empty, the classes of the two parts differ, or an image cannot be read.
    """
    if size < 1 or margin < 0:
        raise ValueError(f"imagefolder needs size ≥ 1 and margin ≥ 0, got {size} and {margin}")
    root = Path(folder).expanduser()
    train = root / "train"
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise WrongData(f"{root} needs the folders train/<class>/ and val/<class>/ (or test/<class>/)")
    classes = _classes(train)
    if classes != (found := _classes(test)):
        differing = sorted(set(classes) ^ set(found))
        raise WrongData(f"{train} and {test} have different classes: {', '.join(differing[:5])}")
    parts = [_read(part, classes, size, margin, threads) for part in (train, test)]
    return Arrays(*parts[0], *parts[1], num_classes=len(classes))


def _classes(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise WrongData(f"{folder} has no class folders")
    return classes


def _read(
    folder: Path, classes: list[str], size: int, margin: int, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not files:
        raise WrongData(f"{folder} has no images")
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)

    def read(index: int) -> None:
        images[index] = _image(files[index][0], size, margin)

    with ThreadPoolExecutor(threads) as pool:  # decoding releases the interpreter's lock
        for _ in bar(pool.map(read, range(len(files))), total=len(files), desc=folder.name, unit="image"):
            pass
    return images, np.array([label for _, label in files], dtype=np.int64)


def _image(file: Path, size: int, margin: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise WrongData(f"{file} cannot be read: {error}") from error
    scale = (size + margin) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(resized).transpose(2, 0, 1)
