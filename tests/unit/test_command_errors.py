"""Mistakes in a command are one line that says what to do, before anything is computed or lost; and help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curvspace.cli.app import app
from tests.unit.command_line import ENVIRONMENT, HERE, WORDS, run


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eigs",), "give the folder of a run, or --model and --data"),
        (("eigs", "--model", "nowhere:build", "--data", "digits"), "there is no module nowhere"),
        ((*WORDS[:2], f"{HERE}:nothing", *WORDS[3:]), "module users_code has no function nothing"),
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


@pytest.mark.parametrize("words", [["--help"], ["eigs", "--help"], ["train", "--help"], ["data"]])
def test_help_starts_without_torch(words):
    code = (
        "import sys; from curvspace.cli.app import app\n"
        f"try: app({words})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
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


def test_nobody_reads_on(tmp_path):
    code = "import sys; from curvspace.cli import common; common.tell('x' * 10)\nsys.stderr.write('went on')"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
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
    assert "hessian of users_code:build" in done.stdout
    assert done.stderr.strip().endswith(
        "cannot be written: No space left on device; mend that and run the same command again"
    )
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["mine"]
