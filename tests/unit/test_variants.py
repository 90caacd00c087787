"""Variants of a data set: subsets, labels, types, normalisation; and augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvspace.datasets import DataSet, load
from curvspace.datasets.augment import crop_flip
from curvspace.datasets.store import Arrays, make_card, save
from curvspace.training.loop import minibatches
from curvspace.training.spec import Task


def rows(inputs: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def coloured() -> Arrays:
    """Random images of three channels of different brightness."""
    generator = np.random.default_rng(0)
    images = (generator.integers(256, size=(60, 3, 4, 4)) * np.array([1, 0.5, 0.2])[:, None, None]).astype(np.uint8)
    targets = generator.integers(3, size=60)
    return Arrays(images[:40], targets[:40], images[40:], targets[40:], num_classes=3)


def variant(folder: Path, **options: Any) -> DataSet:
    return load(folder, {"source": "digits", **options})


def test_parts_have_the_sizes_asked_for_and_share_no_example(digits_dir: Path):
    data = variant(digits_dir, train=900, validation=300, test=50)
    assert (len(data.train), len(data.validation), len(data.test)) == (900, 300, 50)
    assert len(rows(data.train.inputs) | rows(data.validation.inputs) | rows(data.test.inputs)) == 1250
    everything = variant(digits_dir, validation=300)
    assert len(everything.train) == 1442 - 300


def test_validation_stays_when_the_training_set_grows(digits_dir: Path):
    small, large = (variant(digits_dir, train=n, validation=200) for n in (100, 1000))
    assert torch.equal(small.validation.inputs, large.validation.inputs)
    assert torch.equal(small.train.inputs, large.train.inputs[:100])


def test_the_test_set_can_serve_as_validation_set(digits_dir: Path):
    data = variant(digits_dir, validation="test")
    assert torch.equal(data.validation.inputs, data.test.inputs)
    assert len(data.train) == 1442
    assert len(variant(digits_dir, validation=0).validation) == 0


def test_the_subset_follows_its_seed(digits_dir: Path):
    first, again, other = (variant(digits_dir, train=50, subset_seed=s).train.inputs for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_original_order_without_a_seed(digits_dir: Path):
    ordered, shuffled = variant(digits_dir, subset_seed=None), variant(digits_dir)
    assert ordered.train.targets[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rows(ordered.train.inputs) == rows(shuffled.train.inputs)


def test_permuted_labels_keep_their_counts_but_say_nothing(digits_dir: Path):
    true, permuted = variant(digits_dir, validation=300), variant(digits_dir, validation=300, labels="permuted")
    other = variant(digits_dir, validation=300, labels="permuted", label_seed=1)
    assert torch.equal(true.train.inputs, permuted.train.inputs)
    assert torch.equal(true.train.targets.bincount(), permuted.train.targets.bincount())
    assert (true.train.targets == permuted.train.targets).float().mean() < 0.15
    assert not torch.equal(permuted.train.targets, other.train.targets)
    assert torch.equal(true.validation.targets, permuted.validation.targets)


def test_even_odd_labels(digits_dir: Path):
    true, parity = variant(digits_dir, labels=True), variant(digits_dir, labels="even-odd")
    assert parity.num_classes == 2
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(true, part).targets % 2, getattr(parity, part).targets)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalised_training_images_have_mean_0_and_deviation_1(digits_dir: Path, dtype: str):
    data = variant(digits_dir, dtype=dtype)
    x = data.normalise(data.train.inputs)
    assert data.train.inputs.dtype == torch.uint8
    assert x.dtype == getattr(torch, dtype)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-4)


def test_unit_normalisation(digits_dir: Path):
    data = variant(digits_dir, normalisation="unit", dtype="float64")
    torch.testing.assert_close(data.normalise(data.train.inputs), data.train.inputs.double() / 255)


def test_centred_normalisation_takes_one_mean_of_all_pixels_and_channels(digits_dir: Path, tmp_path: Path):
    data = variant(digits_dir, normalisation="centred", dtype="float64")
    pixels = data.train.inputs.double()
    torch.testing.assert_close(data.normalise(data.train.inputs), (pixels - pixels.mean()) / 255)
    save(tmp_path, arrays := coloured(), make_card("coloured", arrays, "test", {}))
    data = load(tmp_path, {"normalisation": "centred", "dtype": "float64"})
    mean = arrays.train_inputs.mean()  # the channels' means differ
    expected = (data.train.inputs.double() - mean) / 255
    torch.testing.assert_close(data.normalise(data.train.inputs), expected)


def test_whitened_images_have_the_spectrum_that_the_bounds_leave(tmp_path: Path):
    """Against NumPy: contrasts made even, then each principal axis stretched to the mean one, if it has ten or more."""
    random = np.random.default_rng(1)
    axes = random.normal(size=(12, 12)) * np.geomspace(90, 2, 12)[:, None]  # some axes far below the bound
    images = np.clip(random.normal(size=(3000, 12)) @ axes + 128, 0, 255).astype(np.uint8).reshape(-1, 3, 2, 2)
    targets = random.integers(3, size=3000)
    save(
        tmp_path,
        a := Arrays(images[:2500], targets[:2500], images[2500:], targets[2500:], 3),
        make_card("w", a, "t", {}),
    )
    data = load(tmp_path, {"normalisation": "whitened", "dtype": "float64", "subset_seed": None, "validation": 500})
    x = images.reshape(3000, -1).astype(float)
    x -= x[:2500].mean(0)
    x -= x.mean(1, keepdims=True)
    contrast = x.std(1, ddof=1, keepdims=True)
    b = x * contrast[:2500].mean() / np.maximum(contrast, 40)
    _, s, vt = np.linalg.svd(b[:2500] / 50, full_matrices=False)  # √2500
    z = b @ vt.T @ np.diag(np.sqrt((s**2).mean()) / np.maximum(s, 10)) @ vt
    assert (s < 10).any()
    assert (s > 10).any()
    for split, rows_of in ((data.train, z[:2000]), (data.validation, z[2000:2500]), (data.test, z[2500:])):
        np.testing.assert_allclose(split.inputs.flatten(1).numpy(), rows_of, atol=1e-9 * np.abs(z).max())
    assert data.normalise(data.train.inputs) is data.train.inputs
    assert load(tmp_path, {"normalisation": "whitened"}).train.inputs.dtype == torch.float32


def test_numbers_are_not_whitened(tmp_path: Path):
    x, y = np.zeros((4, 2)), np.zeros(4, dtype=np.int64)
    save(tmp_path, a := Arrays(x, y, x, y, 2), make_card("n", a, "t", {}))
    with pytest.raises(ValueError, match="normalisation: whitened needs images"):
        load(tmp_path, {"normalisation": "whitened"})


def test_random_labels_are_drawn_anew_with_every_class_as_likely(digits_dir: Path):
    true, drawn, again = (variant(digits_dir, labels=labels) for labels in ("true", "random", "random"))
    assert torch.equal(drawn.train.targets, again.train.targets)
    assert not torch.equal(drawn.train.targets, variant(digits_dir, labels="random", label_seed=1).train.targets)
    assert torch.equal(drawn.test.targets, true.test.targets)
    counts, n = drawn.train.targets.bincount(minlength=10), len(drawn.train)
    assert ((counts - n / 10).abs() < 5 * (0.09 * n) ** 0.5).all()  # five s.d. of a binomial count
    assert not torch.equal(counts, true.train.targets.bincount(minlength=10))  # a permutation would keep them
    agree = (drawn.train.targets == true.train.targets).float().mean().item()
    assert agree == pytest.approx(0.1, abs=5 * (0.09 / n) ** 0.5)


def test_resized_images_fit_the_larger_networks(digits_dir: Path):
    data, original = variant(digits_dir, resize=16), variant(digits_dir)
    assert data.input_shape == (1, 16, 16)
    assert data.train.inputs.dtype == torch.uint8
    halves = data.train.inputs.float().unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean((3, 5))
    correlation = np.corrcoef(halves.numpy().ravel(), original.train.inputs.numpy().ravel())[0, 1]
    assert correlation > 0.97
    assert data.normalise(data.train.inputs).std().item() == pytest.approx(1, abs=1e-3)


def test_batches_cover_a_split_in_order(digits_dir: Path):
    data = variant(digits_dir, train=250)
    batches = data.batches("train", 100)
    assert [len(y) for _, y in batches] == [100, 100, 50]
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), data.normalise(data.train.inputs))
    assert torch.equal(torch.cat([y for _, y in data.batches(data.test)]), data.test.targets)
    with pytest.raises(ValueError, match="'training'"):
        data.batches("training")


def test_taking_some_examples(digits_dir: Path):
    data = variant(digits_dir)
    assert torch.equal(data.train.take(7).targets, data.train.targets[:7])
    drawn = data.train.take(200, seed=3)
    assert len(rows(drawn.inputs)) == 200
    assert torch.equal(drawn.inputs, data.train.take(200, seed=3).inputs)
    with pytest.raises(ValueError, match="2000"):
        data.train.take(2000)


def test_the_folder_above_will_do(digits_dir: Path):
    assert len(load(digits_dir.parent, {"source": "digits"}).train) == 1442


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "mnist"}, ["'digits'", "'mnist'"]),
        ({"trian": 100}, ["'trian'", "train"]),
        ({"train": 2000}, ["2000", "1442"]),
        ({"train": 1400, "validation": 100}, ["1400", "100", "1442"]),
        ({"test": 1000}, ["1000", "355"]),
        ({"train": 0}, ["train", "0"]),
        ({"train": True}, ["train", "True"]),
        ({"train": 0.5}, ["train", "0.5"]),
        ({"train": "test"}, ["train", "'test'"]),
        ({"subset_seed": -1}, ["subset_seed", "-1"]),
        ({"labels": "wrong"}, ["labels", "'wrong'", "permuted"]),
        ({"validation": "some"}, ["validation", "'some'", "test"]),
        ({"dtype": "float16"}, ["dtype", "'float16'"]),
        ({"normalisation": "none"}, ["'none'"]),
    ],
)
def test_wrong_options_are_named(digits_dir: Path, options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as error:
        load(digits_dir, options)
    assert all(word in str(error.value) for word in words)


def padded_crops(images: Tensor, padding: int, border: str) -> list[set[bytes]]:
    """All crops of each image out of its padded self, mirrored or not, by plain slicing."""
    height, width = images.shape[2:]
    mode = "constant" if border == "zero" else "reflect"
    sides = [(0, 0), (padding, padding), (padding, padding)]
    result = []
    for image in images.numpy():
        wide = np.pad(image, sides, mode=mode)
        shifts = [(i, j) for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        crops = [wide[:, i : i + height, j : j + width] for i, j in shifts]
        result.append({c.tobytes() for crop in crops for c in (crop, crop[:, :, ::-1])})
    return result


@pytest.mark.parametrize("border", ["zero", "reflect"])
def test_augmented_images_are_crops_of_the_padded_ones(border: str):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 6, 5), generator=random, dtype=torch.uint8)
    allowed = padded_crops(images, 2, border)
    seen: list[set[bytes]] = [set() for _ in allowed]
    for _ in range(800):
        for place, image in enumerate(crop_flip(images, random, padding=2, border=border)):
            seen[place].add(image.numpy().tobytes())
    assert seen == allowed  # every one of the 50 crops appears, and nothing else


def test_augmentation_follows_its_generator_alone():
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)

    def draw(seed: int) -> Tensor:
        return crop_flip(images, torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(crop_flip(images, torch.Generator(), padding=0, flip=False), images)


@pytest.mark.parametrize("wrong", [{"padding": 8}, {"padding": -1}, {"border": "wrap"}])
def test_wrong_augmentation_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError):
        crop_flip(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.Generator(), **wrong)


def test_a_task_says_how_far_its_images_are_shifted(digits_dir: Path):
    data = variant(digits_dir, normalisation="unit")

    def taken(padding: int) -> Tensor:
        task = Task(augment="crop-flip", augment_padding=padding)
        return next(minibatches(data, task, len(data.train), 0, 0))[0]

    whole = {x.numpy().tobytes() for x in data.normalise(data.train.inputs)}
    mirrored = {x.flip(-1).contiguous().numpy().tobytes() for x in data.normalise(data.train.inputs)}
    assert {x.numpy().tobytes() for x in taken(0)} <= whole | mirrored
    inside = [(taken(padding)[:, :, :3] == 0).flatten(2).all(-1).float().mean().item() for padding in (0, 4)]
    assert inside[1] > inside[0] + 0.1  # three black rows at the top in one of nine at least
    with pytest.raises(ValueError, match="augment_padding must be a whole number of at least 0"):
        Task(augment_padding=-1)
