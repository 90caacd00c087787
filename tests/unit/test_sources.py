"""Sources of data: formats, checks, the order of trying, what happens when one or all of them fail."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from curvspace.cli.data import main
from curvspace.datasets import load, prepare, sources
from curvspace.datasets.catalogue import KNOWN, Known
from curvspace.datasets.formats import read_idx, unpack
from curvspace.datasets.imagefolder import imagefolder
from curvspace.datasets.obtain import DataUnavailable
from curvspace.datasets.store import Arrays, WrongData, load_raw
from tests.unit import source_files as files

FORMATS: dict[str, tuple[str, Callable[[Path, Arrays], None]]] = {
    "idx": ("mnist", files.write_idx),
    "idx.gz": ("fashion-mnist", partial(files.write_idx, gzipped=True)),
    "pickles": ("cifar10", files.write_cifar10),
    "sheets": ("cifar10", files.write_sheets),
    "cifar100": ("cifar100", files.write_cifar100),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_with_the_original_files_serves(know, alone: Path, tmp_path: Path, form: str):
    name, write = FORMATS[form]
    arrays, _ = know(name)
    write(tmp_path / "mine" / "below", arrays)
    card = prepare(name, tmp_path / "out", sources=["folder"], folder=tmp_path / "mine")
    back, _ = load_raw(tmp_path / "out")
    assert card["source"] == "folder"
    for field in ("train_inputs", "train_targets", "test_inputs", "test_targets"):
        np.testing.assert_array_equal(getattr(back, field), getattr(arrays, field))


def test_an_archive_in_the_folder_serves(know, alone: Path, tmp_path: Path):
    arrays, _ = know("cifar10")
    files.write_cifar10(tmp_path / "cifar-10-batches-py", arrays)
    (tmp_path / "mine").mkdir()
    files.write_archive(tmp_path / "mine" / "cifar-10-python.tar.gz", tmp_path / "cifar-10-batches-py")
    assert prepare("cifar10", tmp_path / "out", offline=True, folder=tmp_path / "mine")["source"] == "folder"


def test_files_of_the_same_format_are_not_mixed_up(know, alone: Path, tmp_path: Path):
    arrays, _ = know("fashion-mnist")
    files.write_idx(tmp_path / "mine" / "a", files.tiny("mnist", seed=1)[0])
    files.write_idx(tmp_path / "mine" / "b", arrays)
    prepare("fashion-mnist", tmp_path / "out", offline=True, folder=tmp_path / "mine")
    assert load_raw(tmp_path / "out")[0].digest() == arrays.digest()


def damaged_files() -> Iterator[tuple[str, str, str]]:
    for form in FORMATS:
        names = {"idx": "train-images-idx3-ubyte", "idx.gz": "t10k-labels-idx1-ubyte.gz", "pickles": "data_batch_3"}
        file = names.get(form, "test" if form == "cifar100" else "data_batch_2.png")
        for damage in ("missing", "truncated", "altered", "empty"):
            if (form, damage) != ("cifar100", "altered"):  # without a checksum of its arrays: see the test below
                yield form, file, damage
    yield "sheets", "train_lables.json", "truncated"
    yield "sheets", "test_lables.json", "missing"


@pytest.mark.parametrize(("form", "file", "damage"), list(damaged_files()))
def test_a_damaged_file_is_an_error_and_never_an_array(
    know, alone: Path, tmp_path: Path, form: str, file: str, damage: str
):
    name, write = FORMATS[form]
    arrays, _ = know(name)
    write(tmp_path / "mine", arrays)
    damaged = tmp_path / "mine" / file
    content = damaged.read_bytes()
    if damage == "missing":
        damaged.unlink()
    elif damage == "altered":
        middle = len(content) // 2
        damaged.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        damaged.write_bytes(content[: len(content) * 2 // 3 if damage == "truncated" else 0])
    with pytest.raises(DataUnavailable) as error:
        prepare(name, tmp_path / "out", sources=["folder"], folder=tmp_path / "mine")
    assert "folder: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_cifar100_is_known_by_its_original_files(know, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arrays, known = know("cifar100")
    files.write_cifar100(tmp_path / "mine", arrays)
    sums = {n: hashlib.md5((tmp_path / "mine" / n).read_bytes()).hexdigest() for n in ("train", "test")}
    monkeypatch.setitem(KNOWN, "cifar100", replace(known, sha256=None, md5=sums))
    assert prepare("cifar100", tmp_path / "out", offline=True, folder=tmp_path / "mine")["num_classes"] == 100
    files.write_cifar100(tmp_path / "mine", files.tiny("cifar100", seed=1)[0])
    with pytest.raises(DataUnavailable, match="MD5"):
        prepare("cifar100", tmp_path / "out", offline=True, folder=tmp_path / "mine")


def test_counts_and_shape_are_checked_too():
    arrays, known = files.tiny("cifar10")
    known.check(arrays)
    for changes in ({"train": 19}, {"test": 7}, {"input_shape": (1, 32, 32)}, {"sha256": "0" * 64}):
        with pytest.raises(WrongData, match="cifar10"):
            replace(known, **changes).check(arrays)


def test_a_pickle_cannot_run_code(know, alone: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    arrays, _ = know("cifar10")
    files.write_cifar10(tmp_path / "mine", arrays)
    (tmp_path / "mine" / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataUnavailable, match="data_batch_1"):
        prepare("cifar10", tmp_path / "out", offline=True, folder=tmp_path / "mine")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "module", ["anything.numpy", "evil_numpy", "numpy_", "my.core.multiarray", "x._codecs", "numpy.x"]
)
def test_a_pickle_imports_nothing_of_a_name_that_only_ends_like_an_allowed_one(
    know, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
):
    """What a pickle names is imported before anything can be asked about it."""
    name = {"multiarray": "_reconstruct", "_codecs": "encode"}.get(module.rpartition(".")[2], "ndarray")
    package = tmp_path / "importable" / Path(*module.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass {name}: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "importable")
    arrays, _ = know("cifar10")
    files.write_cifar10(tmp_path / "mine", arrays)
    (tmp_path / "mine" / "data_batch_1").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(DataUnavailable, match=f"it holds a {module}.{name}"):
        prepare("cifar10", tmp_path / "out", offline=True, folder=tmp_path / "mine")
    assert not (tmp_path / "ran").exists()


def test_pickled_arrays_of_old_numpy_are_read(know, alone: Path, tmp_path: Path):
    arrays, _ = know("cifar10")
    files.write_cifar10(tmp_path / "mine", arrays)
    for file in (tmp_path / "mine").iterdir():  # the module's name in the original files
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (tmp_path / "mine" / "test_batch").read_bytes()
    prepare("cifar10", tmp_path / "out", offline=True, folder=tmp_path / "mine")


@pytest.mark.parametrize("name", ["../escaped", "in/../../escaped", "ABSOLUTE"])
def test_an_archive_cannot_write_outside(name: str, tmp_path: Path):
    member = tarfile.TarInfo(str(tmp_path / "escaped") if name == "ABSOLUTE" else name)
    member.size = 1
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(WrongData, match="outside"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "into")
    assert not (tmp_path / "escaped").exists()


def test_of_an_archive_files_are_taken_and_no_links(tmp_path: Path):
    """A link to a folder outside, and then a file below it, would land there."""
    (tmp_path / "elsewhere").mkdir()
    link, below, good = tarfile.TarInfo("link"), tarfile.TarInfo("link/file"), tarfile.TarInfo("package/good")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for member in (link, below, good):
            archive.addfile(member)
    unpack(tmp_path / "links.tar", tmp_path / "into")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "into" / "link").is_symlink()
    assert (tmp_path / "into" / "package" / "good").is_file()


def test_no_idx_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"\x00\x00\x0d\x01" + bytes(40))  # of floats
    with pytest.raises(WrongData, match="no IDX"):
        read_idx(tmp_path / "file")


# --- the order of sources ------------------------------------------------------------------------------------------


def test_the_first_good_source_serves(know, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arrays, _ = know("mnist")
    wrong = files.tiny("mnist", seed=1)[0]
    asked = []

    def unreachable(*_: object) -> Arrays:
        asked.append("torchvision")
        raise sources.SourceError("not reachable")

    def altered(known: Known, *_: object) -> Arrays:
        asked.append("npm")
        known.check(wrong)
        return wrong

    monkeypatch.setitem(sources.SOURCES, "torchvision", unreachable)
    monkeypatch.setitem(sources.SOURCES, "npm", altered)
    files.write_idx(tmp_path / "mine", arrays)
    order = ["npm", "torchvision", "folder", "debian"]
    assert prepare("mnist", tmp_path / "out", sources=order, folder=tmp_path / "mine")["source"] == "folder"
    assert asked == ["npm", "torchvision"]


def test_when_all_fail_the_error_says_what_and_why(know, alone: Path, tmp_path: Path, monkeypatch):
    know("mnist")
    monkeypatch.setattr(sources, "_reachable", lambda urls: [])
    with pytest.raises(DataUnavailable) as error:
        prepare("mnist", tmp_path / "out")
    text = str(error.value)
    for part in (
        "mnist",
        "torchvision: none of its hosts can be reached",
        "npm: the program npm is not installed",
        "debian: no Debian package of it is known",
        "folder: no folder is configured",
        "make smoke",
        "data.folder",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()


def test_offline_asks_nobody(know, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    know("mnist")
    for name in ("torchvision", "npm", "debian"):
        monkeypatch.setitem(sources.SOURCES, name, lambda *_: pytest.fail("the network was used"))
    with pytest.raises(DataUnavailable, match=r"data\.offline"):
        prepare("mnist", tmp_path / "out", offline=True)
    for name in ("digits", "sine", "gaussian-mixture"):
        prepare(name, tmp_path / name, offline=True)


def test_wrong_requests_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="'ftp'"):
        prepare("mnist", tmp_path, sources=["ftp"])
    with pytest.raises(ValueError, match="imagenet"):
        prepare("imagenet", tmp_path)
    with pytest.raises(ValueError, match="size"):
        prepare("mnist", tmp_path, options={"size": 3})


# --- a user's own images ----------------------------------------------------------------------------------------------


def test_image_folder(tmp_path: Path):
    files.write_image_folder(tmp_path / "mine")
    entry = {"source": "imagefolder", "folder": str(tmp_path / "mine"), "size": 16, "margin": 4}
    prepare("imagefolder", tmp_path / "out", options={k: v for k, v in entry.items() if k != "source"}, offline=True)
    data = load(tmp_path / "out", {**entry, "subset_seed": None})
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (6, 6, (3, 16, 16), 2)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]  # ant, cat
    assert data.train.inputs[4, :, 8, 8].tolist() == [200, 90, 40]
    assert torch.equal(data.train.inputs[0], torch.full((3, 16, 16), 100, dtype=torch.uint8))


@pytest.mark.parametrize("fault", ["no folder", "no val", "other classes", "no images", "broken image"])
def test_faulty_image_folders_are_explained(tmp_path: Path, fault: str):
    root = tmp_path / "mine"
    if fault != "no folder":
        files.write_image_folder(root)
    if fault == "no val":
        (root / "val").rename(root / "held-out")
    elif fault == "other classes":
        (root / "val" / "cat").rename(root / "val" / "dog")
    elif fault == "no images":
        for file in (root / "train").rglob("*.png"):
            file.unlink()
    elif fault == "broken image":
        (root / "train" / "ant" / "1.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(WrongData, match=str(root)):
        imagefolder(str(root), size=8)


# --- the command line -------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["digits", "--out", str(tmp_path / "digits"), "--offline"])
    assert len(load(tmp_path / "digits").train) == 1442
    record = json.loads((tmp_path / "digits" / "run.json").read_text())
    assert record["job"] == {"source": "digits"}
    assert record["served_by"] == "scikit-learn"
    main(["--spec", '{"source": "sine", "examples": 9}', "--out", str(tmp_path / "sine")])
    assert len(load(tmp_path / "sine").train) == 9


@pytest.mark.parametrize("arguments", [["mnist", "--offline"], ["mnsit"], ["mnist", "--sources", "ftp"], []])
def test_command_line_errors_are_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "curvspace data: " in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "mean", "std", "labels"),
    [
        ("mnist", [0.13066], [0.30811], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        ("fashion-mnist", [0.28604], [0.35302], [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        ("cifar10", [0.49140, 0.48216, 0.44653], [0.24703, 0.24349, 0.26159], [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]),
    ],
)
def test_real_data(tmp_path: Path, name: str, mean: list[float], std: list[float], labels: list[int]):
    try:
        card = prepare(name, tmp_path / name)
    except DataUnavailable as error:
        if any(isinstance(failure, WrongData) for failure in error.failures.values()):
            raise
        pytest.skip(f"no source of {name} can be reached from here")
    assert card["sha256"] == KNOWN[name].sha256
    np.testing.assert_allclose(card["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(card["std"], std, atol=1e-5)
    arrays, _ = load_raw(tmp_path / name)
    assert arrays.train_targets[:10].tolist() == labels
    if name != "mnist":
        assert np.bincount(arrays.train_targets).tolist() == [KNOWN[name].train // 10] * 10
