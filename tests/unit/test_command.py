"""The command ``curvspace`` as a user types it: networks and data of one's own, runs, stages, errors in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvspace
from curvspace.cli import options
from curvspace.cli.app import app
from curvspace.seeds import derived_seed

HERE = "test_command"


def build(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def by_shape(input_shape, num_classes):
    return nn.Linear(input_shape[0], num_classes)


def flagged(width: int = 5, bias=True, dropout: float = 0.0, mode="same"):
    return nn.Sequential(nn.Linear(4, width, bias), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, 3))


def arrays():
    x, y = pair()
    return x.numpy(), y.numpy()


def needs_width(width):
    return build(width)


def not_a_model():
    return 3


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 4, generator=generator), torch.randint(3, (30,), generator=generator)


def listed():
    x, y = pair()
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def loader():
    return torch.utils.data.DataLoader(dataset(), batch_size=8)


def dataset():
    return torch.utils.data.TensorDataset(*pair())


def scaled_loss(outputs, targets):
    return 2 * nn.functional.cross_entropy(outputs, targets)


class Bank(nn.Module):
    """Reads a memory: an input that may be as long as the batch without holding its examples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x, bank):
        return self.inner(x + torch.softmax(x @ bank.T, 1) @ bank)


class MaskFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, mask, x):
        return self.inner(x * mask.sum())


class Centred(nn.Module):
    """Each example's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


def too_wide():
    return nn.Linear(7, 3)


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def bank_pair():
    x, y = pair()
    return (x, torch.randn(30, 4, generator=torch.Generator().manual_seed(1))), y


def bank_listed():
    return [bank_pair()]


def bank_mapping():
    (x, bank), y = bank_pair()
    return [{"x": x, "bank": bank, "labels": y}]


def mask_pair():
    x, y = pair()
    return (torch.ones(6, 6) / 36, x), y


def coupled_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) ** 2


def run(*words: str | Path, ok: bool = True) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert (done.exit_code == 0) == ok, done.output
    if not ok:
        (line,) = done.stderr.strip().splitlines()
        return line
    return done.stdout


def found(*words: str | Path) -> dict[str, Any]:
    return json.loads(run(*words, "--json", "--quiet", "--device", "cpu"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    torch.save(build().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    run("data", "digits", "--out", folder / "data" / "digits", "--offline")
    words = ["--model", "fc", "--model-option", "widths=[8]", "--data", "digits", "--data-option", "train=300"]
    words += ["--data-folder", folder / "data", "--lr", "0.05", "--epochs", "2", "--checkpoint-every", "3"]
    run("train", *words, "--batch-size", "100", "--device", "cpu", "--quiet", "--out", folder / "results/runs/one")
    return folder


@pytest.mark.parametrize("data", ["pair", "arrays", "listed", "loader", "dataset"])
def test_eigs_of_ones_own_network_and_data(data, weights):
    got = found(
        "eigs",
        "--model",
        f"{HERE}:build",
        "--data",
        f"{HERE}:{data}",
        "--checkpoint",
        weights,
        "-k",
        4,
        "--dtype=float64",
    )
    model = build().double()
    model.load_state_dict(torch.load(weights))
    x, y = pair()
    values = torch.linalg.eigvalsh(oracles.dense_hessian(model, [(x.double(), y)], "cross_entropy"))
    assert got["values"] == pytest.approx(values.flip(0)[:4].tolist(), abs=1e-3)
    assert got["converged"] is True
    assert got["examples"] == 30
    assert got["parameters"] == 43


def test_options_of_the_subject(weights, tmp_path):
    common = ["eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:loader", "--checkpoint", weights, "-k", "2"]
    assert found(*common, "--batches", "2")["examples"] == 16
    assert found(*common, "--examples", "19")["examples"] == 19
    once, twice = found(*common), found(*common, "--loss", f"{HERE}:scaled_loss")
    assert twice["values"] == pytest.approx([2 * v for v in once["values"]], rel=1e-3)
    part = found(*common, "--parameters", "2.*")
    assert part["parameters"] == 18
    assert part["values"][0] <= once["values"][0]
    assert "no trainable parameter is named 'head.*'" in run(*common, "--parameters", "head.*", ok=False)
    lowest = found(*common, "--which", "SA")["values"]
    assert lowest[0] <= lowest[1] < once["values"][1]
    assert min(found(*common, "--matrix", "gauss-newton", "--which", "SA")["values"]) > -1e-6
    found(*common, "--vectors", tmp_path / "v.npz", "--plot", tmp_path / "p.png")
    saved = np.load(tmp_path / "v.npz")
    assert saved["vectors"].shape == (43, 2)
    assert saved["values"].tolist() == pytest.approx(once["values"])
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "eigenvalue" in run(*common, "-q")


def loss_of(model: str, data: str, *words: str) -> float:
    got = found("sharpness", "--model", f"{HERE}:{model}", "--data", f"{HERE}:{data}", "--dtype", "float64", *words)
    return got["rows"][0]["loss"]


@pytest.mark.parametrize(
    ("model", "data", "cut"),
    [
        ("Bank", "bank_pair", ("--batch-size", "8")),
        ("Bank", "bank_pair", ("--examples", "12")),
        ("Bank", "bank_listed", ("--examples", "12")),
        ("Bank", "bank_mapping", ("--examples", "12")),
        ("Centred", "pair", ("--batch-size", "8")),
        ("Centred", "listed", ("--examples", "25")),
        ("build", "pair", ("--loss", f"{HERE}:coupled_loss", "--batch-size", "8")),
    ],
)
def test_a_batch_whose_parts_make_another_function_is_not_cut(model, data, cut):
    words = ("--model", f"{HERE}:{model}", "--data", f"{HERE}:{data}", *cut)
    message = run("sharpness", *words, "--device", "cpu", ok=False)
    assert "does not treat examples one by one; leave out --batch-size and --examples" in message


@pytest.mark.parametrize(
    ("model", "data", "cut"),
    [
        ("build", "pair", "7"),
        ("MaskFirst", "mask_pair", "8"),
        ("with_batch_norm", "pair", "8"),
        ("Bank", "bank_pair", ""),
    ],
)
def test_the_loss_of_a_pair_is_that_of_the_whole_batch(model, data, cut):
    inputs, y = globals()[data]()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "init"))
        network = globals()[model]().double().eval()
    tensors = [t.double() for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
    expected = float(nn.functional.cross_entropy(network(*tensors), y))
    assert loss_of(model, data, *(("--batch-size", cut) if cut else ())) == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_pair_have_batch_statistics_of_their_own():
    x, y = pair()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "init"))
        network = with_batch_norm().double()
    parts = [float(nn.functional.cross_entropy(network(x[i : i + 10].double()), y[i : i + 10])) for i in (0, 10, 20)]
    got = loss_of("with_batch_norm", "pair", "--batch-size", "10", "--batch-norm", "batch")
    assert got == pytest.approx(sum(parts) / 3, rel=1e-9)


def test_a_network_that_fails_says_so_itself():
    words = ("--model", f"{HERE}:too_wide", "--data", f"{HERE}:pair", "--batch-size", "8")
    assert "shapes cannot be multiplied" in run("sharpness", *words, "--device", "cpu", ok=False)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ('bias="false"', "bias must be True or False, got 'false'"),
        ("bias=off", "bias must be True or False, got 'off'"),
        ('width="7"', "width must be a number, got '7'"),
        ('dropout="1e-3"', "dropout must be a number, got '1e-3'"),
    ],
)
def test_text_is_no_flag_and_no_number(option, said):
    words = ("eigs", "--model", f"{HERE}:flagged", "--data", f"{HERE}:pair", "-k", 1, "-q", "--model-option")
    assert said in run(*words, option, ok=False)
    run(*words, "mode='1'")


def test_models_made_from_shape_and_classes_or_options():
    assert found("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:pair", "-k", "1")["parameters"] == 15
    assert (
        found(
            "eigs", "--model", "fc", "--model-option", "widths=[6]", "--data", "digits", "--examples", "50", "-k", "1"
        )["parameters"]
        == 64 * 6 + 6 + 6 * 10 + 10
    )
    words = ("eigs", "--model", f"{HERE}:needs_width", "--data", f"{HERE}:pair", "-k", "1")
    assert found(*words, "--model-option", "width=2")["parameters"] == 19
    assert "'width' has no value; give --model-option width=…" in run(*words, ok=False)


def test_weights_from_wrappers_and_safetensors(weights, tmp_path):
    state = torch.load(weights)
    forms = {
        "a.pt": {"model": state, "epoch": 3},
        "b.pt": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "c.pt": {f"module.{k}": v for k, v in state.items()},
    }
    words = ("eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:pair", "-k", "1", "--checkpoint")
    expected = found(*words, weights)["values"]
    for name, value in forms.items():
        torch.save(value, tmp_path / name)
        assert found(*words, tmp_path / name)["values"] == expected
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(state, tmp_path / "d.safetensors")
    assert found(*words, tmp_path / "d.safetensors")["values"] == expected


def test_density(weights, tmp_path):
    words = (
        "density",
        "--model",
        f"{HERE}:build",
        "--data",
        f"{HERE}:pair",
        "--checkpoint",
        weights,
        "--axis",
        "linear",
    )
    got = found(*words, "--steps", "43", "--plot", tmp_path / "d.pdf", "--dtype", "float64")
    assert np.trapezoid(got["density"], got["grid"]) == pytest.approx(1, abs=0.02)
    model = build().double()
    model.load_state_dict(torch.load(weights))
    x, y = pair()
    values = torch.linalg.eigvalsh(oracles.dense_hessian(model, [(x.double(), y)], "cross_entropy"))
    assert got["largest"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert got["smallest"] == pytest.approx(float(values[0]), rel=1e-6)
    assert (tmp_path / "d.pdf").read_bytes().startswith(b"%PDF")


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


WORDS = ("eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:pair")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eigs",), "give the folder of a run, or --model and --data"),
        (("eigs", "--model", "nowhere:build", "--data", "digits"), "there is no module nowhere"),
        ((*WORDS[:2], f"{HERE}:nothing", *WORDS[3:]), "module test_command has no function nothing"),
        ((*WORDS[:2], f"{HERE}:not_a_model", *WORDS[3:]), "returned int, not a torch.nn.Module"),
        ((*WORDS[:4], "mnst"), "'mnst' is no data set; there are: mnist"),
        ((*WORDS[:4], "mnist", "--data-folder", "nowhere"), "curvspace data mnist --out nowhere/mnist"),
        ((*WORDS[:4], f"{HERE}:not_a_model"), "returned int; wanted: (inputs, targets)"),
        ((*WORDS, "--checkpoint", "none.pt"), "--checkpoint none.pt is not there"),
        ((*WORDS, "--checkpoint", __file__), "is not readable as weights"),
        ((*WORDS, "--matrix", "fisher"), "--matrix must be hessian or gauss-newton, got 'fisher'"),
        ((*WORDS, "--loss", "hinge"), "unknown loss 'hinge'"),
        ((*WORDS, "--which", "XX"), "which must be"),
        ((*WORDS, "--examples", "0"), "--examples must be at least 1"),
        ((*WORDS, "--device", "tpu"), "device = 'tpu' is not allowed"),
        ((*WORDS, "--model-option", "width"), "'width' is no option; write NAME=VALUE"),
        ((*WORDS, "--step", "3"), "--step is of a run"),
        ((*WORDS, "--threads", "-1"), "--threads must not be negative"),
        (("eigs", "nowhere"), "nowhere holds no finished run"),
        (("train", "--out", "x"), "say what to train by one of"),
        (("train", "--out", "x", "--model", "fc"), "--model needs --data too"),
        (("train", "--out", "x", "--spec", "{"), "--spec is not readable as JSON"),
        (("train", "--out", "x", "--spec", "@nowhere.json"), "nowhere.json is not readable: No such file"),
        (("redo", "nowhere", "--out", "x"), "lies in none of the folders runs, measures"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run(*words, ok=False)


def test_weights_of_another_network(weights, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    line = run(*WORDS, "--checkpoint", tmp_path / "other.pt", ok=False)
    assert line.endswith("it lacks '0.bias' and 3 more, and it has 'bias' and 1 more, which the network has not")
    line = run(*WORDS, "--checkpoint", weights, "--model-option", "width=6", ok=False)
    assert "size mismatch for 0.weight" in line


def test_data_lists_what_there_is():
    assert run("data").startswith("mnist, fashion-mnist, cifar10")


@pytest.mark.parametrize("words", [["--help"], ["eigs", "--help"], ["train", "--help"], ["data"]])
def test_help_starts_without_torch(words):
    code = (
        "import sys; from curvspace.cli.app import app\n"
        f"try: app({words})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(curvspace.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", ["eigs", "density", "sharpness", "train", "data", "redo"])
def test_help_has_examples(command):
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "Example" in text
    assert f"curvspace {command}" in text


def test_verify_outside_of_a_clone_says_where_to_call_it(monkeypatch, tmp_path):
    from curvspace.cli import stages

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "a/b/c/stages.py"))
    assert "this needs the repository (a folder with workflow/verify.py); call it from inside a clone" in run(
        "verify", ok=False
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("False", False), ("false", False), ("TRUE", True), ("None", None), ("null", None), (".9", 0.9), ("5.", 5.0)),
        *(("1e-3", 1e-3), ("+2", 2), ("[1, 2]", [1, 2]), ("relu", "relu"), ('"False"', "False"), ("1.2.3", "1.2.3")),
    ],
)
def test_values_of_options_in_the_spelling_of_python_yaml_and_json(text, value):
    found = options.parsed([f"batch-norm={text}"])["batch_norm"]
    assert (found, type(found)) == (value, type(value))


def test_json_has_null_for_what_is_no_number():
    found = options.finite({"a": [math.nan, 1.0], "b": {"c": math.inf}, "d": "NaN", "e": (1, -math.inf)})
    assert found == {"a": [None, 1.0], "b": {"c": None}, "d": "NaN", "e": [1, None]}


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vectors", "."), "--vectors . is a folder; name a file"),
        (("--vectors", "v.pt"), "--vectors v.pt must end in .npz"),
        (("--vectors", "file/v.npz"), "file/v.npz cannot be written"),
        (("--plot", "."), "--plot . is a folder; name a file"),
        (("--plot", "p"), "--plot p must end in .avif or"),
        (("--plot", "p.nope"), "--plot p.nope must end in"),
        (("--plot", "file/p.png"), "file/p.png cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    monkeypatch.setattr("curvspace.cli.loading.opened", lambda subject: pytest.fail("it computes"))
    assert message in run(*WORDS, *words, ok=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


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


def test_arrays_of_a_function_are_made_anew_though_older_ones_are_prepared(finished, tmp_path, monkeypatch):
    from curvspace.datasets.store import Arrays

    def given(seed: int) -> Arrays:
        x, y = np.random.default_rng(seed).normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
        return Arrays(x, y, x, y, 3)

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "made", lambda: given(0), raising=False)
    monkeypatch.chdir(tmp_path)
    words = ("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:made", "-k", "1")
    run("data", f"{HERE}:made")
    before = found(*words)["values"]
    monkeypatch.setattr(module, "made", lambda: given(1))
    after = found(*words)["values"]
    assert after != before
    fresh = found("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:made", "-k", "1", "--data-folder", "none")
    assert after == fresh["values"]


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


def test_nobody_reads_on(tmp_path):
    code = "import sys; from curvspace.cli import common; common.tell('x' * 10)\nsys.stderr.write('went on')"
    environment = {**os.environ, "PYTHONPATH": str(Path(curvspace.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize(("option", "name"), [("--vectors", "v.npz"), ("--plot", "p.png")])
def test_a_full_disk_at_the_end_loses_neither_the_result_nor_what_was_there(option, name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("mine")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    done = CliRunner().invoke(app, [*WORDS, "-k", "2", "--quiet", option, str(tmp_path / name)])
    assert done.exit_code == 1
    assert "hessian of test_command:build" in done.stdout
    assert done.stderr.strip().endswith(
        "cannot be written: No space left on device; mend that and run the same command again"
    )
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["mine"]


def test_two_processes_that_prepare_one_data_set_wait_for_each_other(tmp_path):
    from curvspace.training import lock

    with lock.hold(tmp_path / "set"):
        environment = {**os.environ, "PYTHONPATH": str(Path(curvspace.__file__).parents[1])}
        command = [sys.executable, "-m", "curvspace.cli.data", "digits", "--out", str(tmp_path / "set"), "--offline"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert "is in use by process" in process.stderr.readline()
        assert [entry.name for entry in (tmp_path / "set").iterdir()] == ["lock"]
    process.communicate()
    assert process.returncode == 0
    assert sorted(entry.name for entry in (tmp_path / "set").iterdir()) == ["arrays.npz", "card.json", "run.json"]
