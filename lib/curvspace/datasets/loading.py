"""From prepared arrays to the splits of one variant, whole on the device.

Images stay uint8 and are normalised minibatch by minibatch: a quarter of the memory, and augmentation is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from curvspace.datasets.store import ARRAYS, Arrays, channel_statistics, load_raw
from curvspace.datasets.whitening import whitener

NORMALISATIONS = ("standard", "unit", "centred", "whitened")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LABELS = ("true", "permuted", "random", "even-odd")


@dataclass(frozen=True)
class Split:
    """Examples: inputs (N, ...) and targets (N,) of classes or (N, 1) of numbers."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, count: int, seed: int | None = None) -> Split:
        """``count`` examples: the first ones, or drawn without replacement with ``seed``.

        Raises
        ------
        ValueError
            If there are fewer.
        """
        if not 0 <= count <= len(self):
            raise ValueError(f"cannot take {count} of {len(self)} examples")
        if seed is None:
            return Split(self.inputs[:count], self.targets[:count])
        index = torch.from_numpy(np.random.default_rng(seed).permutation(len(self))[:count]).to(self.targets.device)
        return Split(self.inputs[index], self.targets[index])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class DataSet:
    """A variant of a data set.

    num_classes: number of classes; of outputs where the targets are numbers (``is_regression``).
    mean, std: (C, 1, 1) on the scale 0 to 1, that inputs are normalised by; None where inputs are floats already.
    input_shape: shape of one example. dtype: of what :meth:`normalise` gives.
    digest: SHA-256 of the prepared arrays that it is a variant of; empty for data made otherwise.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: Tensor | None
    std: Tensor | None
    input_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    digest: str = ""

    @property
    def is_regression(self) -> bool:
        return self.train.targets.is_floating_point()

    def to(self, device: torch.device | str) -> DataSet:
        """The same data on a device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=None if self.mean is None else self.mean.to(device),
            std=None if self.std is None else self.std.to(device),
        )

    def normalise(self, inputs: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) -> (x/255 − mean)/std, channel by channel; floats pass through."""
        if inputs.dtype != torch.uint8 or self.mean is None or self.std is None:
            return inputs
        return inputs.to(self.dtype).sub_(255 * self.mean).div_(255 * self.std)

    def batches(self, split: str | Split = "train", batch_size: int = 1000) -> list[tuple[Tensor, Tensor]]:
        """A whole split ("train", "validation", "test", or any :class:`Split`) as normalised batches, in order."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        if isinstance(split, str) and split not in parts:
            raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
        examples = parts[split] if isinstance(split, str) else split
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        starts = range(0, len(examples), batch_size)
        slices = [slice(start, start + batch_size) for start in starts]
        return [(self.normalise(examples.inputs[part]), examples.targets[part]) for part in slices]


@dataclass(frozen=True)
class Variant:
    """Options of a ``datasets`` entry that choose a variant.

    train: how many training examples; None for all that validation leaves.
    validation: how many, taken from the training set; "test" makes the test set serve as validation set as well,
        as is customary for CIFAR-10.
    test: how many test examples; None for all.
    subset_seed: the training set's order before it is split (validation is taken from the end of that order, so that
        it stays the same for any ``train``), and the test set's; None keeps the original order.
    labels: "true"; "permuted": a random permutation of the training split's labels with ``label_seed``; "random":
        drawn anew for each training example, every class as likely, with ``label_seed`` (validation and test keep
        theirs in both cases); "even-odd": class modulo 2, in every split.
    imbalance: how many times fewer training examples the last class has than the first; from class to class their
        number falls by the same factor. Each class's first examples are kept. 1: all of them.
    resize: images are scaled to resize × resize pixels (bilinear).
    normalisation: "standard": by each channel's mean and s.d. of the training images; "unit": x/255, to 0…1 only;
        "centred": (x − mean over all training images, channels and pixels)/255; "whitened": as
        :func:`~curvspace.datasets.whitening.whitener` has it. Of the whole training set as it was prepared; with
        ``resize`` of the training split.
    dtype: "float32" or "float64", of normalised inputs and numeric targets.
    """

    train: int | None = None
    validation: int | str = "test"
    test: int | None = None
    subset_seed: int | None = 0
    labels: str = "true"
    label_seed: int = 0
    imbalance: float = 1.0
    resize: int | None = None
    normalisation: str = "standard"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABELS)
        _one_of("normalisation", self.normalisation, NORMALISATIONS)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        if isinstance(self.validation, str):
            _one_of("validation", self.validation, ("test",))
        if isinstance(self.imbalance, bool) or not isinstance(self.imbalance, int | float) or not self.imbalance >= 1:
            raise ValueError(f"data set option imbalance must be a number of at least 1, got {self.imbalance!r}")
        for key, smallest in (("train", 1), ("validation", 0), ("test", 1), ("resize", 1), ("subset_seed", 0)):
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
            if not (whole or value == ("test" if key == "validation" else None)):
                raise ValueError(f"data set option {key} must be a whole number of at least {smallest}, got {value!r}")


def load(folder: str | Path, options: Mapping[str, Any] | None = None) -> DataSet:
    """The variant of a prepared data set that a ``datasets`` entry of the config describes, on the CPU.

    Parameters
    ----------
    folder
        Where :func:`curvspace.datasets.prepare` wrote it; or the folder above, then ``options["source"]`` is looked
        for in it.
    options
        ``source`` and the fields of :class:`Variant`, for example
        ``{"source": "mnist", "train": 50000, "validation": 10000, "labels": "permuted"}``. Options that shaped the
        arrays when they were prepared are accepted if they are the same.

    Raises
    ------
    FileNotFoundError, WrongData
        If the arrays are missing or damaged.
    ValueError
        If an option is unknown, has a wrong value, or asks for more examples than there are.
    """
    options = dict(options or {})
    folder = Path(folder)
    if not (folder / ARRAYS).exists() and (folder / str(options.get("source")) / ARRAYS).exists():
        folder = folder / str(options["source"])
    arrays, card = load_raw(folder)
    variant = _variant(options, card, folder)
    order = _order(len(arrays.train_targets), variant.subset_seed)
    train_index, validation_index = _split(order, variant)
    test_index = _first(_order(len(arrays.test_targets), variant.subset_seed), variant.test, "test")
    test = _tensors(arrays.test_inputs, arrays.test_targets, test_index, variant)
    train = _tensors(arrays.train_inputs, arrays.train_targets, train_index, variant)
    if variant.imbalance > 1:
        train = _long_tailed(train, 2 if variant.labels == "even-odd" else card["num_classes"], variant.imbalance)
    if variant.labels == "permuted":
        shuffle = np.random.default_rng([variant.label_seed, 1]).permutation(len(train))
        train = Split(train.inputs, train.targets[torch.from_numpy(shuffle)])
    elif variant.labels == "random":
        if train.targets.is_floating_point():
            raise ValueError("labels: random needs classes, but this data set's targets are numbers")
        drawn = np.random.default_rng([variant.label_seed, 2]).integers(card["num_classes"], size=len(train))
        train = Split(train.inputs, torch.from_numpy(drawn))
    validation = (
        test
        if validation_index is None
        else _tensors(arrays.train_inputs, arrays.train_targets, validation_index, variant)
    )
    mean, std = _statistics(card, arrays, train, variant)
    if variant.normalisation == "whitened":
        train, validation, test = _whitened(arrays, train, validation, test, variant)
    return DataSet(
        name=card["name"],
        train=train,
        validation=validation,
        test=test,
        num_classes=2 if variant.labels == "even-odd" else card["num_classes"],
        mean=mean,
        std=std,
        input_shape=tuple(train.inputs.shape[1:]),
        dtype=DTYPES[variant.dtype],
        digest=card["sha256"],
    )


def _variant(options: dict[str, Any], card: Mapping[str, Any], folder: Path) -> Variant:
    source = options.pop("source", card["name"])
    if source != card["name"]:
        raise ValueError(f"{folder} holds {card['name']!r}, but the data set's source is {source!r}")
    if options.get("labels") is True:
        options["labels"] = "true"  # what YAML makes of `labels: true`
    known = {f.name for f in fields(Variant)}
    for key in sorted(set(options) - known):
        if key not in card["options"]:
            allowed = ", ".join(sorted(known | set(card["options"])))
            raise ValueError(f"unknown data set option {key!r}; allowed: {allowed}")
        if options[key] != card["options"][key]:
            raise ValueError(f"{folder} was prepared with {key}={card['options'][key]!r}, not {options[key]!r}")
    return Variant(**{key: value for key, value in options.items() if key in known})


def _order(count: int, seed: int | None) -> NDArray[np.int64]:
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)


def _split(order: NDArray[np.int64], variant: Variant) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    if isinstance(variant.validation, str):
        return _first(order, variant.train, "train"), None
    rest = len(order) - variant.validation
    if rest < (variant.train or 1):
        raise ValueError(
            f"train: {variant.train} and validation: {variant.validation} ask for more than {len(order)} examples"
        )
    return _first(order[:rest], variant.train, "train"), order[rest:]


def _first(order: NDArray[np.int64], count: int | None, key: str) -> NDArray[np.int64]:
    if count is not None and count > len(order):
        raise ValueError(f"{key}: {count} asks for more than {len(order)} examples")
    return order[:count]


def _tensors(inputs: NDArray[Any], targets: NDArray[Any], index: NDArray[np.int64], variant: Variant) -> Split:
    dtype = DTYPES[variant.dtype]
    x, y = torch.from_numpy(inputs[index]), torch.from_numpy(targets[index])
    if x.dtype != torch.uint8:
        if variant.resize:
            raise ValueError("resize: needs images, but this data set's inputs are numbers")
        x = x.to(dtype)
    elif variant.resize:
        x = _resize(x, variant.resize)
    if y.is_floating_point():
        if variant.labels == "even-odd":
            raise ValueError("labels: even-odd needs classes, but this data set's targets are numbers")
        return Split(x, y.to(dtype))
    return Split(x, y % 2 if variant.labels == "even-odd" else y)


def _long_tailed(split: Split, classes: int, imbalance: float) -> Split:
    r"""The first :math:`n\,\rho^{-k/(C-1)}` examples of each class k, in their order, n the smallest class's."""
    if split.targets.is_floating_point():
        raise ValueError("imbalance: needs classes, but this data set's targets are numbers")
    found = [torch.nonzero(split.targets == k)[:, 0] for k in range(classes)]
    fewest = min(len(places) for places in found)
    kept = [places[: max(1, int(fewest * imbalance ** (-k / max(1, classes - 1))))] for k, places in enumerate(found)]
    index = torch.cat(kept).sort().values
    return Split(split.inputs[index], split.targets[index])


def _resize(images: Tensor, size: int) -> Tensor:
    def scale(part: Tensor) -> Tensor:
        scaled = interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)

    return torch.cat([scale(part) for part in images.split(4096)]) if len(images) else images


def _statistics(
    card: Mapping[str, Any], arrays: Arrays, train: Split, variant: Variant
) -> tuple[Tensor | None, Tensor | None]:
    if arrays.train_inputs.dtype != np.uint8:
        return None, None
    mean, std = card["mean"], card["std"]
    if variant.resize:
        mean, std = channel_statistics(train.inputs.numpy())
    if variant.normalisation == "unit":
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    elif variant.normalisation == "centred":  # every channel has as many pixels: the mean of means is that of all
        mean, std = [sum(mean) / len(mean)] * len(mean), [1.0] * len(std)
    dtype = DTYPES[variant.dtype]
    std = [value or 1.0 for value in std]  # a constant channel: 0 after the mean is taken off
    return torch.tensor(mean, dtype=dtype).view(-1, 1, 1), torch.tensor(std, dtype=dtype).view(-1, 1, 1)


def _whitened(arrays: Arrays, train: Split, validation: Split, test: Split, variant: Variant) -> tuple[Split, ...]:
    """The three splits with whitened images of a floating type, which :meth:`DataSet.normalise` leaves as they are."""
    if train.inputs.dtype != torch.uint8:
        raise ValueError("normalisation: whitened needs images, but this data set's inputs are numbers")
    whiten = whitener(train.inputs if variant.resize else torch.from_numpy(arrays.train_inputs), DTYPES[variant.dtype])
    whitened = {id(split): Split(whiten(split.inputs), split.targets) for split in (train, validation, test)}
    return tuple(whitened[id(split)] for split in (train, validation, test))


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"data set option {key} must be one of {', '.join(allowed)}, got {value!r}")
