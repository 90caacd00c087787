"""The commands of runs and data sets: train, sharpness along a run, redo, data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.command_line import ENVIRONMENT, HERE, found, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    run("data", "digits", "--out", folder / "data" / "digits", "--offline")
    words = ["--model", "fc", "--model-option", "widths=[8]", "--data", "digits", "--data-option", "train=300"]
    words += ["--data-folder", folder / "data", "--lr", "0.05", "--epochs", "2", "--checkpoint-every", "3"]
    run("train", *words, "--batch-size", "100", "--device", "cpu", "--quiet", "--out", folder / "results/runs/one")
    return folder


def test_sharpness_along_a_run(finished):
    where = ("--data-folder", finished / "data", "--examples", "100")
    run_folder = finished / "results/runs/one"
    csv = finished / "s.csv"
    got = found("sharpness", run_folder, "--step", "all", *where, "--csv", csv, "--plot", finished / "s.png")
    assert [row["step"] for row in got["rows"]] == [0, 3, 6]
    assert got["rows"][0]["stable_lr"] == pytest.approx(2 / got["rows"][0]["sharpness"])
    assert len(csv.read_text().splitlines()) == 4
    whole = got["rows"][-1]["sharpness"]
    (row,) = found("sharpness", run_folder, *where, "--parameters", "*.bias")["rows"]
    assert row["sharpness"] < whole
    last = found("eigs", run_folder, *where, "-k", "5")
    assert last["step"] == 6
    assert got["rows"][-1]["sharpness"] == pytest.approx(last["values"][0], rel=1e-3)
    line = run("eigs", run_folder, "--step", "4", *where, ok=False)
    assert line.endswith("has no checkpoint '4'; it has 0, 3, 6, or: last, all")


def test_a_run_again_by_its_place_by_its_record_and_by_a_spec(finished):
    one = finished / "results/runs/one"
    record = json.loads((one / "run.json").read_text())
    spec = finished / "spec.json"
    spec.write_text(json.dumps(record["job"]))
    words = ("--data-folder", finished / "data", "--quiet", "--out")
    run("train", one, *words, finished / "a")
    run("train", "--spec", f"@{one / 'run.json'}", *words, finished / "b")
    run("train", "--spec", f"@{spec}", *words, finished / "c")
    run("redo", one, "--data-folder", finished / "data", "--out", finished / "d")
    expected = torch.load(one / "checkpoints/step-6.pt")["model"]
    for again in "abcd":
        weights = torch.load(finished / again / "checkpoints/step-6.pt")["model"]
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert "--out is the run itself" in run("train", one, "--out", one, ok=False)


def test_data_lists_what_there_is():
    assert run("data").startswith("mnist, fashion-mnist, cifar10")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("eigs", ("--data", "cifar10"), "a run knows its network, weights and data; leave out --data"),
        ("eigs", ("--model-option", "width=3"), "leave out --model-option"),
        ("eigs", ("--step", "all"), "--step all is for sharpness"),
        ("density", ("--step", "all"), "--step all is for sharpness"),
        ("train", ("--lr", "0.5"), "--lr stands in the spec already"),
        ("train", ("--device", "cpu", "--epochs", "3"), "--device stands in the spec already"),
        ("train", ("--optimizer", "sgd"), "--optimizer stands in the spec already"),
        ("redo", (), "--out is the result itself"),
    ],
)
def test_no_option_beside_a_run_goes_unheard(finished, tmp_path, command, words, message):
    one = finished / "results/runs/one"
    out = {"train": ("--out", tmp_path / "x"), "redo": ("--out", one)}.get(command, ())
    assert message in run(command, one, *words, *out, "--data-folder", finished / "data", ok=False)


MINE = """
from torch import nn
import mine_layers

def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), mine_layers.Act(), nn.Linear(4, num_classes))
"""
LAYERS = "from torch import nn\nAct = nn.{}  # {}\n"


def test_a_run_is_trained_again_when_the_users_code_has_changed(finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--data", "digits", "--data-folder", finished / "data", "--quiet", "--out", tmp_path / "run"]

    def train(act: str, comment: str, ok: bool = True, *more: str) -> str:
        (tmp_path / "mine_net.py").write_text(MINE)
        (tmp_path / "mine_layers.py").write_text(LAYERS.format(act, comment))
        for name in ("mine_net", "mine_layers"):
            sys.modules.pop(name, None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return run("train", "--model", "mine_net:build", *words, *more, ok=ok)

    def weights() -> list[torch.Tensor]:
        return list(torch.load(tmp_path / "run/checkpoints/step-15.pt")["model"].values())

    train("Tanh", "one")
    first = weights()
    train("Tanh", "another comment")
    assert all(torch.equal(a, b) for a, b in zip(first, weights(), strict=True))
    assert "finished run of other settings, code, data" in train("ReLU", "", False)
    train("ReLU", "", True, "--overwrite")
    assert not torch.equal(first[0], weights()[0])


def test_images_in_folders_by_the_example_of_the_help(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            file = tmp_path / "photos" / part / name / "1.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (260, 260)).save(file)
    (line,) = [
        line for line in run("data", "--help").splitlines() if "imagefolder" in line and "curvspace data" in line
    ]
    run(*line.split()[1:])
    assert json.loads((tmp_path / "data/photos/card.json").read_text())["options"] == {"folder": "photos"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "nope"), "unknown model kind 'nope'"),
        (("--model", f"{HERE}:nope"), "has no function 'nope'"),
        (("--model-option", "bogus=1"), "does not take the options {'bogus': 1}"),
        (("--model-option", "kind=softmax"), "--model-option kind is not allowed: --model says it"),
        (("--data-option", "source=sine"), "--data-option source is not allowed: --data says it"),
        (("--data-option", "train=0"), "train must be a whole number of at least 1"),
        (("--data-option", "train=99999"), "asks for more than 1442 examples"),
        (("--data-option", "labels=foo"), "labels must be one of true, permuted"),
        (("--optimizer", "nope"), "unknown optimizer kind 'nope'"),
        (("--optimizer-option", "momentum=-2"), "Invalid momentum value: -2"),
        (("--loss", "nope"), "unknown loss 'nope'"),
        (("--out", __file__), "is no folder, and a run's outputs need one"),
    ],
)
def test_mistakes_of_a_training_are_one_line(finished, tmp_path, words, message):
    given = {"--model": "fc", "--data": "digits", "--data-folder": finished / "data", "--out": tmp_path / "x"}
    given |= dict([words])
    line = run("train", "--quiet", *(word for pair in given.items() for word in pair), ok=False)
    assert message in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('{"dataset": 3}', "the spec's dataset needs a name and a source"),
        ('{"dataset": {"name": "d", "source": [1]}}', "the spec's dataset needs a name and a source"),
        ('{"job": 3}', "--spec must hold a JSON object, got int"),
        ("@binary", "binary is not readable as JSON"),
        ("[" * 100_000, "--spec is not readable as JSON"),
    ],
    ids=["number", "list", "job", "binary", "deep"],
)
def test_specs_of_another_form_are_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(bytes(range(256)))
    assert message in run("train", "--out", "x", "--spec", spec, ok=False)


def test_redo_replaces_no_file_of_another_origin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results/figures"
    folder.mkdir(parents=True)
    (folder / "A-F1.run.json").write_text('{"job": {}}')
    (tmp_path / "thesis.png").write_text("mine")
    line = run("redo", folder / "A-F1", "--out", "thesis.csv", ok=False)
    assert line.endswith("thesis.png is there and would be replaced; move it away, or name another file")


def test_two_processes_that_prepare_one_data_set_wait_for_each_other(tmp_path):
    from curvspace.training import lock

    with lock.hold(tmp_path / "set"):
        command = [sys.executable, "-m", "curvspace.cli.data", "digits", "--out", str(tmp_path / "set"), "--offline"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert "is in use by process" in process.stderr.readline()
        assert [entry.name for entry in (tmp_path / "set").iterdir()] == ["lock"]
    process.communicate()
    assert process.returncode == 0
    assert sorted(entry.name for entry in (tmp_path / "set").iterdir()) == ["arrays.npz", "card.json", "run.json"]
