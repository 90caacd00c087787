"""The command ``curvspace`` on networks and data of one's own: eigenvalues, density, sharpness, weights, options."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import users_code
from torch import nn

from curvspace.cli import options
from curvspace.seeds import derived_seed
from tests.unit import oracles
from tests.unit.command_line import HERE, WORDS, found, run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    torch.save(users_code.build().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("data", ["pair", "arrays", "listed", "loader", "dataset"])
def test_eigs_of_ones_own_network_and_data(data, weights):
    words = ("eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:{data}", "--checkpoint", weights)
    got = found(*words, "-k", 4, "--dtype=float64")
    model = users_code.build().double()
    model.load_state_dict(torch.load(weights))
    x, y = users_code.pair()
    values = torch.linalg.eigvalsh(oracles.dense_hessian(model, [(x.double(), y)], "cross_entropy"))
    assert got["values"] == pytest.approx(values.flip(0)[:4].tolist(), abs=1e-3)
    assert got["converged"] is True
    assert got["examples"] == 30
    assert got["parameters"] == 43


@pytest.fixture
def common(weights: Path) -> list[str | Path]:
    return ["eigs", "--model", f"{HERE}:build", "--data", f"{HERE}:loader", "--checkpoint", weights, "-k", "2"]


@pytest.mark.parametrize(("option", "examples"), [(("--batches", "2"), 16), (("--examples", "19"), 19), ((), 30)])
def test_how_much_of_the_data_is_used(common, option, examples):
    assert found(*common, *option)["examples"] == examples


def test_a_loss_of_ones_own(common):
    once, twice = found(*common), found(*common, "--loss", f"{HERE}:scaled_loss")
    assert twice["values"] == pytest.approx([2 * v for v in once["values"]], rel=1e-3)


def test_a_part_of_the_parameters(common):
    part = found(*common, "--parameters", "2.*")
    assert part["parameters"] == 18
    assert part["values"][0] <= found(*common)["values"][0]
    assert "no trainable parameter is named 'head.*'" in run(*common, "--parameters", "head.*", ok=False)


def test_the_lowest_eigenvalues_and_those_of_gauss_newton(common):
    lowest = found(*common, "--which", "SA")["values"]
    assert lowest[0] <= lowest[1] < found(*common)["values"][1]
    assert min(found(*common, "--matrix", "gauss-newton", "--which", "SA")["values"]) > -1e-6


def test_eigenvectors_and_a_plot_in_files_and_a_table_on_the_terminal(common, tmp_path):
    values = found(*common, "--vectors", tmp_path / "v.npz", "--plot", tmp_path / "p.png")["values"]
    saved = np.load(tmp_path / "v.npz")
    assert saved["vectors"].shape == (43, 2)
    assert saved["values"].tolist() == pytest.approx(values)
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
    inputs, y = getattr(users_code, data)()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "init"))
        network = getattr(users_code, model)().double().eval()
    tensors = [t.double() for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
    expected = float(nn.functional.cross_entropy(network(*tensors), y))
    assert loss_of(model, data, *(("--batch-size", cut) if cut else ())) == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_pair_have_batch_statistics_of_their_own():
    x, y = users_code.pair()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "init"))
        network = users_code.with_batch_norm().double()
    parts = [float(nn.functional.cross_entropy(network(x[i : i + 10].double()), y[i : i + 10])) for i in (0, 10, 20)]
    got = loss_of("with_batch_norm", "pair", "--batch-size", "10", "--batch-norm", "batch")
    assert got == pytest.approx(sum(parts) / 3, rel=1e-9)


def test_models_made_from_shape_and_classes_or_options():
    assert found("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:pair", "-k", "1")["parameters"] == 15
    digits = ("--model-option", "widths=[6]", "--data", "digits", "--examples", "50")
    assert found("eigs", "--model", "fc", *digits, "-k", "1")["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
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


def test_weights_of_another_network(weights, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    line = run(*WORDS, "--checkpoint", tmp_path / "other.pt", ok=False)
    assert line.endswith("it lacks '0.bias' and 3 more, and it has 'bias' and 1 more, which the network has not")
    line = run(*WORDS, "--checkpoint", weights, "--model-option", "width=6", ok=False)
    assert "size mismatch for 0.weight" in line


def test_density(weights, tmp_path):
    words = ("density", *WORDS[1:], "--checkpoint", weights, "--axis", "linear")
    got = found(*words, "--steps", "43", "--plot", tmp_path / "d.pdf", "--dtype", "float64")
    assert np.trapezoid(got["density"], got["grid"]) == pytest.approx(1, abs=0.02)
    model = users_code.build().double()
    model.load_state_dict(torch.load(weights))
    x, y = users_code.pair()
    values = torch.linalg.eigvalsh(oracles.dense_hessian(model, [(x.double(), y)], "cross_entropy"))
    assert got["largest"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert got["smallest"] == pytest.approx(float(values[0]), rel=1e-6)
    assert (tmp_path / "d.pdf").read_bytes().startswith(b"%PDF")


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


def test_arrays_of_a_function_are_made_anew_though_older_ones_are_prepared(tmp_path, monkeypatch):
    from curvspace.datasets.store import Arrays

    def given(seed: int) -> Arrays:
        x, y = np.random.default_rng(seed).normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
        return Arrays(x, y, x, y, 3)

    monkeypatch.setattr(users_code, "made", lambda: given(0), raising=False)
    monkeypatch.chdir(tmp_path)
    words = ("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:made", "-k", "1")
    run("data", f"{HERE}:made")
    before = found(*words)["values"]
    monkeypatch.setattr(users_code, "made", lambda: given(1))
    after = found(*words)["values"]
    assert after != before
    fresh = found("eigs", "--model", f"{HERE}:by_shape", "--data", f"{HERE}:made", "-k", "1", "--data-folder", "none")
    assert after == fresh["values"]
