"""Whatever ends a command is one line at the end of the error stream: what, where in the user's file, what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from curvspace.cli import train
from curvspace.cli.failures import one_line_errors
from curvspace.datasets import load
from curvspace.datasets.store import Arrays, make_card, save
from curvspace.errors import UserError
from curvspace.files import CannotWrite
from curvspace.training.record import RunRecord
from papers.cli import figure, measure

CLASSES = 3
USER = """
import errno
import sys

import torch
from torch import nn

from curvspace.errors import UserError


def fine(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(9, num_classes))


def raises(*args, **options):
    raise KeyError("width")  # HERE


def few(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(9, num_classes - 1))


def grid(input_shape, num_classes):
    return nn.Linear(3, num_classes)


def wrong_input(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes))


def number(input_shape, num_classes):
    return 3


class Module(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) + self.absent  # HERE TOO


def in_forward(input_shape, num_classes):
    return Module(9, num_classes)


def leaves(*args, **options):
    sys.exit(0)  # LEAVES


def absent_file(*args, **options):
    open("/nowhere/at all")  # ABSENT


def many_lines(*args, **options):
    raise ValueError("first\\n\\tsecond\\n" + "x" * 5000)


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no step")  # STEP


class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


def large(*args, **options):
    return torch.empty(2**58)  # LARGE
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A module of the user's; returns ``file:line`` of a line with a mark."""
    file = tmp_path / "mine" / "users_own.py"
    file.parent.mkdir()
    file.write_text(USER)
    (file.parent / "users_typo.py").write_text("def f(:\n")
    (file.parent / "users_import.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    return lambda mark: f"{file}:{next(n for n, text in enumerate(USER.splitlines(), 1) if text.endswith(mark))}"


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a tiny training."""
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (24, 1, 3, 3), dtype=np.uint8)
    arrays = Arrays(inputs, np.arange(24) % CLASSES, inputs[:6], np.arange(6) % CLASSES, num_classes=CLASSES)
    save(tmp_path / "tiny", arrays, make_card("tiny", arrays, "made here", {}))

    def arguments(
        model: str = "fine", optimizer: str = "sgd", loss: str = "cross_entropy", **options: object
    ) -> list[str]:
        spec = {
            "dataset": {"name": "tiny", "source": "tiny"},
            "model": {"name": "net", "kind": f"users_own:{model}" if ":" not in model else model},
            "optimizer": {"name": "opt", "kind": optimizer, **options},
            "task": {"epochs": 2, "loss": loss},
            "batch_size": 8,
            "lr": 0.1,
            "device": "cpu",
        }
        return ["--spec", json.dumps(spec), "--data", str(tmp_path / "tiny"), "--out", str(tmp_path / "run"), "--quiet"]

    return arguments


def ends(action: Callable[[], object], capsys: pytest.CaptureFixture[str], status: int = 1) -> tuple[str, str]:
    """The last line of the error stream, and what stands above it."""
    with pytest.raises(SystemExit) as stop:
        action()
    assert stop.value.code == status
    *above, last = capsys.readouterr().err.strip().split("\n")
    assert re.match(r"curvspace \w+: \S", last)
    assert len(last) < 1000
    return last, "\n".join(above)


@pytest.mark.parametrize(
    ("model", "optimizer", "said", "mark"),
    [
        ("raises", "sgd", "KeyError: 'width'", "# HERE"),
        ("in_forward", "sgd", "AttributeError: 'Module' object has no attribute 'absent'", "# HERE TOO"),
        ("fine", "users_own:Broken", "RuntimeError: no step", "# STEP"),
        ("fine", "users_own:raises", "KeyError: 'width'", "# HERE"),
        ("large", "sgd", "no memory left", "# LARGE"),
    ],
)
def test_a_users_exception_in_training_names_the_users_line(user, job, capsys, model, optimizer, said, mark):
    last, above = ends(lambda: train.main(job(model, optimizer)), capsys)
    assert last.startswith(f"curvspace train: {said}")
    assert f"at {user(mark)} (" in last
    assert above.startswith("Traceback")
    assert user(mark).split("/")[-1].split(":")[0] in above


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("few", "model net (users_own:few) has outputs of shape (2, 2) for 2 examples; wanted is (2, 3)"),
        ("grid", "model net (users_own:grid) has outputs of shape (2, 1, 3, 3) for 2 examples; wanted is (2, 3)"),
        ("number", "model kind 'users_own:number' returned int; a torch.nn.Module is wanted"),
    ],
)
def test_a_model_of_the_wrong_outputs_is_refused_before_the_first_step(user, job, capsys, tmp_path, model, said):
    last, above = ends(lambda: train.main(job(model)), capsys)
    assert said in last
    assert above == ""
    assert not (tmp_path / "run").exists()


def test_a_loss_that_does_not_fit_the_targets_is_refused_before_the_first_step(user, job, capsys, tmp_path):
    last, above = ends(lambda: train.main(job("fine", loss="mse")), capsys)
    assert "loss mse does not fit targets that are classes: mse needs targets of shape (2, 3), got (2,)" in last
    assert above == ""
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_take_the_examples_is_named(user, job, capsys):
    last, _ = ends(lambda: train.main(job("wrong_input")), capsys)
    assert "shapes cannot be multiplied" in last
    assert "[model net (users_own:wrong_input), on inputs of shape (2, 1, 3, 3)]" in last


@pytest.mark.parametrize(
    ("module", "said", "where"),
    [
        ("users_typo", "SyntaxError", "users_typo.py:1"),
        ("users_import", "ModuleNotFoundError: No module named 'nothing_of_this_name'", "users_import.py:1"),
    ],
)
def test_a_users_module_that_cannot_be_imported_is_named_with_its_line(user, job, capsys, module, said, where):
    last, _ = ends(lambda: train.main(job(f"{module}:f")), capsys)
    assert said in last
    assert where in last


@pytest.mark.parametrize("command", [measure, figure])
@pytest.mark.parametrize(
    ("function", "said", "mark"),
    [
        ("raises", "KeyError: 'width'", "# HERE"),
        ("leaves", "sys.exit(0) was called", "# LEAVES"),
        ("absent_file", "No such file or directory: '/nowhere/at all'", "# ABSENT"),
        ("many_lines", "ValueError: first second xxx", "5000)"),
        ("large", "no memory left", "# LARGE"),
    ],
)
def test_a_users_measure_or_figure_that_fails(user, capsys, tmp_path, command, function, said, mark):
    spec = json.dumps({"function": f"users_own:{function}", "inputs": {}, "options": {}})
    words = ["--spec", spec, "--results", str(tmp_path), "--out", f"{tmp_path}/x.csv"]
    last, _ = ends(lambda: command.main(words), capsys)
    assert said in last
    assert f"{user(mark)} ({function})" in last
    assert not (tmp_path / "x.csv").exists()


def failing(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        with one_line_errors("measure"):
            raise error

    return action


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO"])
def test_the_systems_refusal_to_write_names_the_file(capsys, number):
    code = getattr(errno, number)
    last, _ = ends(failing(OSError(code, os.strerror(code), "results/x.csv")), capsys)
    assert last.startswith(f"curvspace measure: results/x.csv: {os.strerror(code)}, at {__file__}:")
    assert "run the same command again" in last
    last, _ = ends(failing(OSError(code, os.strerror(code))), capsys)  # a write into an open file
    assert last.startswith(f"curvspace measure: {os.strerror(code)}, at {__file__}:")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "no memory left (MemoryError)"),
        (MemoryError("Unable to allocate 8.00 PiB for an array"), "no memory left (Unable to allocate"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "no memory left (CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "no memory left (DefaultCPUAllocator"),
        (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), "is the disk full?"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth"),
        (ZeroDivisionError(), "ZeroDivisionError, at "),
    ],
)
def test_other_ends(capsys, error, said):
    last, above = ends(failing(error), capsys)
    assert said in last
    assert f"at {__file__}:" in last
    assert "Traceback" in above


@pytest.mark.parametrize(
    "error", [UserError("mend\nthis"), CannotWrite("x cannot be written: No space left on device")]
)
def test_what_a_user_can_mend_has_no_traceback(capsys, error):
    last, above = ends(failing(error), capsys)
    assert last == f"curvspace measure: {' '.join(str(error).split())}"
    assert above == ""


def test_an_interrupt_keeps_its_exit_status(capsys):
    assert ends(failing(KeyboardInterrupt()), capsys, 130) == ("curvspace measure: stopped", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_told_and_its_handler_put_back(capsys, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:

        def action() -> None:
            with one_line_errors("measure"):
                os.kill(os.getpid(), number)

        last, above = ends(action, capsys, 128 + number)
        assert last.startswith(f"curvspace measure: stopped by {name}")
        assert above == ""
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # nohup
        with one_line_errors("measure"):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("optimizer", ["torch.optim:Adagrad", "users_own:SignDescent"])
def test_a_plain_torch_optimiser_is_a_kind_from_the_spec_to_the_record(user, job, tmp_path, optimizer):
    train.main(job("fine", optimizer))
    record = RunRecord(tmp_path / "run")
    assert record.status == "finished"
    assert record.damage() == []
    assert record.metrics["step"].tolist() == list(range(7))
    if "Sign" in optimizer:  # each weight went six steps of 0.1, up or down
        start = record.build_model(load(tmp_path / "tiny", {"source": "tiny"})).state_dict()["1.weight"]
        steps = (record.checkpoint(6)["model"]["1.weight"] - start) / 0.1
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert set(steps.round().abs().flatten().tolist()) <= {0, 2, 4, 6}
        assert steps.abs().max() > 1
