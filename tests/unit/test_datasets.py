"""Prepared arrays on disk, the embedded and the generated sets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from curvspace.datasets import folder_name, load, prepare, prepare_options
from curvspace.datasets.generated import gaussian_mixture, sine
from curvspace.datasets.store import (
    ARRAYS,
    CARD,
    FIELDS,
    Arrays,
    WrongData,
    channel_statistics,
    load_raw,
    make_card,
    save,
)
from curvspace.errors import UserError


def images(count: int = 12, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    train, test = (random.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8) for n in (count, 6))
    return Arrays(train, np.arange(count) % 3, test, np.arange(6) % 3, num_classes=3)


def store(folder: Path, arrays: Arrays) -> Path:
    save(folder, arrays, make_card("own", arrays, "made here", {}))
    return folder


def test_what_is_stored_comes_back(tmp_path: Path):
    arrays = images()
    back, card = load_raw(store(tmp_path / "own", arrays))
    assert back.digest() == arrays.digest() == card["sha256"]
    assert card["train"] == 12
    assert card["input_shape"] == [3, 4, 4]
    assert sorted(file.name for file in (tmp_path / "own").iterdir()) == [ARRAYS, CARD]


def test_files_depend_on_the_contents_alone(tmp_path: Path):
    first, second = store(tmp_path / "a", images()), store(tmp_path / "b", images())
    for name in (ARRAYS, CARD):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_checksum_sees_values_types_and_shapes_but_not_the_layout_in_memory():
    arrays = images()
    fortran = dataclasses.replace(arrays, train_inputs=np.asfortranarray(arrays.train_inputs))
    swapped = dataclasses.replace(arrays, train_targets=arrays.train_targets.astype(">i8"))
    assert arrays.digest() == fortran.digest() == swapped.digest()
    altered = arrays.train_inputs.copy()
    altered[3, 1, 2, 0] ^= 1
    flat = {f"{part}_inputs": getattr(arrays, f"{part}_inputs").reshape(-1, 1, 6, 8) for part in ("train", "test")}
    others = [
        dataclasses.replace(arrays, train_inputs=altered),
        dataclasses.replace(arrays, train_targets=arrays.train_targets.astype(np.int32)),
        dataclasses.replace(arrays, **flat),
    ]
    assert len({arrays.digest(), *(other.digest() for other in others)}) == 4


def test_channel_statistics_are_those_of_numpy():
    arrays = images(500)
    mean, std = channel_statistics(arrays.train_inputs)
    np.testing.assert_allclose(mean, arrays.train_inputs.mean((0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, arrays.train_inputs.std((0, 2, 3)) / 255, rtol=1e-12)


def test_missing_arrays_say_how_to_make_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"curvspace\.cli\.data"):
        load_raw(tmp_path / "mnist")


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_truncated_arrays_are_refused(tmp_path: Path, keep: int):
    file = store(tmp_path, images()) / ARRAYS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WrongData, match="prepare"):
        load_raw(tmp_path)


def test_any_altered_array_is_refused(tmp_path: Path):
    arrays = images()
    file = store(tmp_path, arrays) / ARRAYS
    content = bytearray(file.read_bytes())
    for part in (arrays.train_inputs, arrays.train_targets, arrays.test_inputs, arrays.test_targets):
        place = bytes(content).index(part.tobytes()) + part.nbytes // 2
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(WrongData, match="damaged"):
            load_raw(tmp_path)
        content[place] ^= 1


@pytest.mark.parametrize("name", [ARRAYS, CARD])
def test_a_flipped_bit_anywhere_is_refused_in_one_line_or_changes_nothing(tmp_path: Path, name: str):
    arrays = images()
    file = store(tmp_path, arrays) / name
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        said = refusal(tmp_path)
        if said is None:  # a time stamp or an attribute in the archive
            back, card = load_raw(tmp_path)
            assert back.digest() == arrays.digest() == card["sha256"]
        else:
            refused += 1
            assert len(said.splitlines()) == 1
            assert str(tmp_path) in said
            assert "again" in said
    assert refused > 100


def refusal(folder: Path) -> str | None:
    try:
        load_raw(folder)
    except WrongData as error:
        return str(error)
    return None


def resaved(folder: Path, arrays: Arrays) -> None:
    """Other arrays, stored in a way that numpy finds nothing to object to."""
    np.savez(folder / ARRAYS, **{name: getattr(arrays, name) for name in FIELDS})


@pytest.mark.parametrize("split", ["train", "test"])
def test_arrays_other_than_those_of_the_card_are_refused(tmp_path: Path, split: str):
    arrays = images()
    labels, inputs = f"{split}_targets", f"{split}_inputs"
    for change in (
        {labels: getattr(arrays, labels)[::-1].copy()},
        {labels: getattr(arrays, labels).astype(np.int32)},
        {inputs: getattr(arrays, inputs)[::-1].copy()},
        {inputs: getattr(arrays, inputs).astype(np.float32)},
    ):
        resaved(store(tmp_path, arrays), dataclasses.replace(arrays, **change))
        with pytest.raises(WrongData, match="SHA-256 differ"):
            load_raw(tmp_path)


def test_damaged_or_foreign_card_is_refused(tmp_path: Path):
    card = store(tmp_path, images()) / CARD
    whole = card.read_text()
    for text in ("", whole[:30], "{}", "[]", "null", "3", '"card"', "\x00" * 40):
        card.write_text(text)
        with pytest.raises(WrongData):
            load_raw(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train", 13),
        ("num_classes", 4),
        ("mean", [0.0] * 3),
        ("std", [1.0] * 3),
        ("name", "mnist"),
        ("options", {"a": 1}),
    ],
)
def test_a_card_that_says_something_else_is_refused(tmp_path: Path, key: str, value: object):
    card = store(tmp_path, images()) / CARD
    card.write_text(json.dumps({**json.loads(card.read_text()), key: value}))
    with pytest.raises(WrongData, match=r"card\.json was altered"):
        load_raw(tmp_path)


def test_a_card_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path):
    card = store(tmp_path, images()) / CARD
    values = json.loads(card.read_text())
    del values["checksum"]
    card.write_text(json.dumps(values))
    with pytest.raises(WrongData, match=r"earlier version.*again"):
        load_raw(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_targets": np.arange(11) % 3},
        {"train_targets": np.arange(12) % 4},
        {"test_targets": np.arange(6) - 1},
        {"test_inputs": np.zeros((6, 3, 4, 5), dtype=np.uint8)},
        {"train_targets": (np.arange(12) % 4).astype(np.uint8)},
        {
            "train_inputs": np.zeros((12, 8, 8, 3), dtype=np.uint8),
            "test_inputs": np.zeros((6, 8, 8, 3), dtype=np.uint8),
        },
        {"train_inputs": np.zeros((12, 8, 8), dtype=np.uint8), "test_inputs": np.zeros((6, 8, 8), dtype=np.uint8)},
        {"train_inputs": np.zeros((12, 8), dtype=np.uint8), "test_inputs": np.zeros((6, 8), dtype=np.uint8)},
        {"train_inputs": torch.zeros(12, 3, 4, 4)},
    ],
)
def test_inconsistent_arrays_are_refused(changes: dict[str, np.ndarray]):
    with pytest.raises(WrongData):
        dataclasses.replace(images(), **changes)


def test_digits_are_scikit_learns(digits_dir: Path):
    from sklearn.datasets import load_digits

    bundle = load_digits()
    data = load(digits_dir, {"subset_seed": None})
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (1442, 355, (1, 8, 8), 10)
    assert all(34 <= count <= 36 for count in np.bincount(data.test.targets))
    grey = np.concatenate([data.train.inputs, data.test.inputs])[:, 0] * (16 / 255)
    original = {(image.tobytes(), label) for image, label in zip(bundle.images, bundle.target, strict=True)}
    labels = np.concatenate([data.train.targets, data.test.targets])
    assert {(image.round().tobytes(), label) for image, label in zip(grey, labels, strict=True)} == original
    first = bundle.images[bundle.target == 0]
    np.testing.assert_array_equal(grey[len(data.train) :][data.test.targets == 0].round(), first[4::5])


def test_gaussian_mixture_is_the_papers():
    arrays = gaussian_mixture(classes=3, dim=400, sigma=0.0, per_class=4, seed=1)
    means = arrays.train_inputs[::4]
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1.0)
    assert 0 < np.abs(np.triu(means @ means.T, 1)).max() < 0.2  # random unit vectors: nearly orthogonal
    np.testing.assert_array_equal(arrays.train_inputs, np.repeat(means, 4, axis=0))
    noisy = gaussian_mixture(classes=3, dim=400, sigma=0.02, per_class=200, seed=1)
    offsets = noisy.train_inputs - np.repeat(means, 200, axis=0)
    assert offsets.std() == pytest.approx(0.02, rel=0.01)
    assert not np.allclose(noisy.train_inputs, noisy.test_inputs)
    exact = gaussian_mixture(classes=3, dim=50, sigma=0.0, per_class=1, orthonormal=True).train_inputs
    np.testing.assert_allclose(exact @ exact.T, np.eye(3), atol=1e-14)


def test_sine_is_one_noisy_period():
    arrays = sine(examples=4000, test_examples=10, noise=0.1, seed=2)
    x, y = arrays.train_inputs, arrays.train_targets
    assert x.shape == y.shape == (4000, 1)
    assert -np.pi <= x.min() < -3.1 < 3.1 < x.max() <= np.pi
    assert np.std(y - np.sin(x)) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gaussian-mixture", {"classes": 1}), ("sine", {"noise": -0.1}), ("sine", {"frequency": 2}), ("digits", {"n": 3})],
)
def test_wrong_generation_options_are_refused(tmp_path: Path, name: str, options: dict[str, float]):
    with pytest.raises(ValueError):
        prepare(name, tmp_path, options=options)
    assert not (tmp_path / ARRAYS).exists()


def test_generated_sets_are_prepared_and_loaded_like_all_others(tmp_path: Path):
    entry = {"source": "sine", "examples": 30, "test_examples": 5, "seed": 3, "validation": 10}
    prepare("sine", tmp_path / folder_name("wave", entry), options=prepare_options(entry))
    data = load(tmp_path / "wave", entry)
    assert data.is_regression
    assert (len(data.train), len(data.validation), len(data.test), data.num_classes) == (20, 10, 5, 1)
    assert data.normalise(data.train.inputs) is data.train.inputs
    for wrong, words in (({"seed": 4}, "seed=3"), ({"resize": 8}, "images"), ({"labels": "even-odd"}, "classes")):
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "wave", {**entry, **wrong})


@pytest.mark.parametrize("name", [ARRAYS, CARD, "run.json"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str):
    if name == ARRAYS:
        np.savez(tmp_path / name, mine=np.arange(3))
    else:
        (tmp_path / name).write_text('{"mine": 1}')
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=f"{name} is no prepared data set's"):
        prepare("sine", tmp_path, options={"examples": 20, "test_examples": 10})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, before)]


@pytest.mark.parametrize("damaged", [ARRAYS, CARD])
def test_a_damaged_data_set_is_prepared_again_where_it_is(tmp_path: Path, damaged: str):
    prepare("sine", tmp_path, options={"examples": 20, "test_examples": 10})
    whole = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[:-40])
    prepare("sine", tmp_path, options={"examples": 20, "test_examples": 10})
    assert (tmp_path / damaged).read_bytes() == whole


def test_a_users_own_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\nfrom curvspace.datasets.store import Arrays\n"
        "def ramp(n):\n    x = np.linspace(0, 1, n)[:, None]\n"
        "    return Arrays(x, (x[:, 0] > 0.5).astype(np.int64), x, (x[:, 0] > 0.5).astype(np.int64), 2)\n"
        "def wrong(noise=0.1, flip=False):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    prepare("own_data:ramp", tmp_path / "ramp", options={"n": 8})
    data = load(tmp_path / "ramp", {"source": "own_data:ramp", "n": 8, "dtype": "float64", "validation": 2})
    assert (len(data.train), data.train.inputs.dtype.itemsize, data.input_shape) == (6, 8, (1,))
    for options in ({"noise": "0.2"}, {"flip": "false"}):
        with pytest.raises(ValueError, match=f"own_data:wrong': {next(iter(options))} must be"):
            prepare("own_data:wrong", tmp_path / "no", options=options)
    for name in ("own_data:wrong", "own_data:absent", "no_such_module:f", "ramp"):
        with pytest.raises(ValueError):
            prepare(name, tmp_path / "no")


def test_variants_of_a_public_set_share_its_folder():
    assert folder_name("mnist-random", {"source": "mnist", "labels": "permuted"}) == "mnist"
    assert folder_name("toy", {"source": "gaussian-mixture"}) == "toy"
    assert folder_name("mine", {"source": "own:f"}) == "mine"
    assert prepare_options({"source": "imagefolder", "folder": "x", "size": 8, "train": 5, "resize": 4}) == {
        "folder": "x",
        "size": 8,
    }
