"""The training loop: resumption bit for bit, divergence as a result, what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from curvspace import datasets
from curvspace.datasets import Split
from curvspace.losses import get_loss
from curvspace.seeds import derived_seed
from curvspace.training import loop
from curvspace.training.loop import evaluate, minibatches
from curvspace.training.record import RunRecord, initial_model
from curvspace.training.run import Interrupted, build_optimizer, train
from curvspace.training.spec import Block, RunSpec, Task

OPTIMIZERS = [
    {"name": "sgd", "kind": "sgd", "momentum": 0.9},
    {"name": "adam", "kind": "adam"},
    {"name": "paper", "kind": "class-gradient-newton", "momentum": 0.9, "damping": 1.0},
    {"name": "curveball", "kind": "curveball"},
    {"name": "nadam", "kind": "torch.optim:NAdam", "weight_decay": 0.01, "decoupled_weight_decay": True},
    {"name": "schedule-free", "kind": "schedulefree:AdamWScheduleFree"},
    {
        "name": "random",
        "kind": "span-filter",
        "base": {"kind": "sgd"},
        "spans": ["random-directions"],
        "refresh_every": 2,
    },
    {"name": "negative", "kind": "negative-curvature", "base": "SGD"},
]


def spec(optimizer: dict, **changes) -> RunSpec:
    values = {
        "dataset": {"name": "digits-600", "source": "digits", "train": 600, "validation": 200},
        "model": {"name": "fc", "kind": "fc", "widths": [12]},
        "optimizer": optimizer,
        "task": {
            "epochs": 2,
            "checkpoints": [0, 3],
            "schedule": {"kind": "per-epoch", "decay": 0.5},
            "evaluate_average": 0.7,
        },
        "batch_size": 128,
        "lr": 0.05,
        "seed": 3,
        **changes,
    }
    return RunSpec.from_dict(values)


def without_clock(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics.drop(columns=["wall_s", "seconds"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
def test_a_run_interrupted_and_resumed_ends_bit_for_bit_where_an_unbroken_one_does(
    optimizer, digits_dir, tmp_path, monkeypatch
):
    if ":" in optimizer["kind"]:
        pytest.importorskip(optimizer["kind"].split(":")[0])
    whole = train(spec(optimizer), digits_dir, tmp_path / "whole", progress=False)

    class Impatient:
        requested = False

    stop, seen = Impatient(), []
    real = loop.fit

    def fit_and_stop(*args, after_step, **kwargs):
        def stopping(state):
            seen.append(state.step)
            stop.requested = state.step == 4 and seen.count(4) == 1
            after_step(state)

        return real(*args, after_step=stopping, **kwargs)

    monkeypatch.setattr("curvspace.training.run.fit", fit_and_stop)
    monkeypatch.setattr("curvspace.training.run._stop_signals", lambda: _Context(stop))
    with pytest.raises(Interrupted, match="step 4 of 10"):
        train(spec(optimizer), digits_dir, tmp_path / "broken", progress=False)
    assert not (tmp_path / "broken" / "run.json").exists()
    broken = train(spec(optimizer), digits_dir, tmp_path / "broken", progress=False)
    assert seen.count(4) == 1
    assert seen[-1] == 10
    pd.testing.assert_frame_equal(without_clock(whole.metrics), without_clock(broken.metrics), check_exact=True)
    for step in whole.steps:
        for name, value in whole.checkpoint(step)["model"].items():
            assert torch.equal(value, broken.checkpoint(step)["model"][name])
    assert not (tmp_path / "broken.state").exists()


class _Context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def test_a_state_of_another_spec_or_code_is_not_resumed(digits_dir, tmp_path, monkeypatch):
    state = tmp_path / "run.state"
    state.mkdir()
    torch.save({"key": "another", "progress": {}, "model": {}, "optimizer": {}}, state / "resume.pt")
    record = train(spec(OPTIMIZERS[0]), digits_dir, tmp_path / "run", progress=False)
    assert record.status == "finished"
    assert record.metrics["step"].tolist() == list(range(11))


def test_divergence_is_a_result(digits_dir, tmp_path):
    record = train(spec(OPTIMIZERS[0], lr=1e4), digits_dir, tmp_path / "run", progress=False)
    assert record.status == "diverged"
    last = record.metrics.iloc[-1]
    assert 1 <= last["step"] < 10
    assert not last["train_loss"] < 100 * record.metrics["eval_train_loss"].iloc[0]
    assert record.steps[-1] == last["step"]


def test_a_finished_run_says_what_it_was(digits_dir, tmp_path):
    record = train(spec(OPTIMIZERS[0]), digits_dir, tmp_path / "run", progress=False)
    metrics = record.metrics
    assert record.steps == [0, 3, 10]
    assert metrics.loc[0, ["dataset", "optimizer", "seed"]].tolist() == ["digits-600", "sgd", 3]
    assert metrics["train_loss"].isna().sum() == 1, "only the evaluation before training has no minibatch loss"
    assert metrics["val_loss"].notna().sum() == 3, "before training and after each of two epochs"
    assert metrics["gradient_evaluations"].iloc[-1] == 10
    assert (np.diff(metrics["wall_s"]) >= 0).all()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    data = record.dataset(digits_dir)
    final = record.model(10, data)
    again = evaluate(final, data, data.validation, get_loss("cross_entropy"))
    assert again == pytest.approx((metrics["val_loss"].iloc[-1], metrics["val_accuracy"].iloc[-1]), rel=1e-12)


def test_checkpoint_zero_is_the_initial_model_of_the_seed(digits_dir, tmp_path):
    record = train(spec(OPTIMIZERS[0]), digits_dir, tmp_path / "run", progress=False)
    data = record.dataset(digits_dir)
    fresh = initial_model(dict(record.spec["model"]), data, 3).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in record.checkpoint(0)["model"].items())
    with pytest.raises(FileNotFoundError, match="no checkpoint at step 7"):
        record.checkpoint(7)


def test_an_epoch_visits_every_example_once_and_epochs_differ(digits_dir):
    data = datasets.load(digits_dir, {"source": "digits", "train": 300, "validation": 100})
    stream = minibatches(data, Task(), 128, seed=0, start=0)
    epochs = [torch.cat([next(stream)[0] for _ in range(3)]) for _ in range(2)]
    assert [len(e) for e in epochs] == [300, 300]
    everything = data.normalise(data.train.inputs)

    def in_some_order(images):
        return torch.sort(images.flatten(1) @ torch.arange(1.0, 65.0)).values

    for epoch in epochs:
        torch.testing.assert_close(in_some_order(epoch), in_some_order(everything))
    assert not torch.equal(epochs[0], epochs[1])
    later = minibatches(data, Task(), 128, seed=0, start=4)
    assert torch.equal(next(later)[0], epochs[1][128:256]), "a stream can be entered at any step"


def test_full_batch_and_the_least_number_of_steps(digits_dir, tmp_path):
    record = train(
        spec(OPTIMIZERS[0], batch_size="full", task={"epochs": 2, "min_steps": 5}),
        digits_dir,
        tmp_path / "run",
        progress=False,
    )
    assert record.metrics["step"].iloc[-1] == 5
    assert record.identity["batch_size"] == 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be .*greater than 0, got -1.0"),
        ({"lr": "0.1"}, "lr must be .*got '0.1'"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, got 1.5"),
        ({"seed": "a"}, "seed must be .*got 'a'"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size must be .*got True"),
        ({"task": {"epochs": "5"}}, "task.epochs must be .*got '5'"),
        ({"task": {"max_steps": 2.5}}, "task.max_steps must be a whole number of at least 1, got 2.5"),
        ({"task": {"max_steps": 0}}, "task.max_steps must be .*got 0"),
        ({"task": {"evaluate_train": -5}}, "task.evaluate_train must be .*got -5"),
        ({"task": {"checkpoint_every": -2}}, "task.checkpoint_every must be .*got -2"),
        ({"task": {"checkpoints": ["2"]}}, r"task.checkpoints\[0\] must be .*got '2'"),
        ({"task": {"checkpoints": 3}}, "task.checkpoints must be a list"),
        ({"task": {"divergence": -1}}, "task.divergence must be .*greater than 1, got -1"),
        ({"task": {"schedule": "cosine"}}, "task.schedule must be a block .*got 'cosine'"),
        ({"task": {"schedule": {"kind": "cosine", "warmup": "0.1"}}}, "schedule.warmup must be a number"),
        ({"task": {"compile": 1}}, "task.compile must be one of False, True, got 1"),
        ({"task": 3}, "block of keys as task, got 3"),
        ({"task": {"epochs": 0}}, "task.epochs"),
        ({"task": {"epoch": 1}}, "'epoch' in task"),
        ({"speed": 1}, "'speed'"),
        ({"model": {"kind": "fc"}}, "model.name"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(OPTIMIZERS[0], **changes)


def drawn(block: dict, seed: int, refreshes: int = 2) -> list[torch.Tensor]:
    """The random directions of an optimiser at its first refreshes."""
    model = torch.nn.Linear(6, 3, dtype=torch.float64)
    optimizer = build_optimizer(spec({"name": "one", **block}, seed=seed), model, 3)
    if block["kind"] == "negative-curvature":
        return [optimizer.direction]
    found = []
    for _ in range(refreshes):
        optimizer.step(torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3)
        found.append(optimizer.bases["random-directions"].state["rows"].clone())
    return found


DRAWING = [
    {"kind": "span-filter", "base": {"kind": "sgd"}, "spans": ["random-directions"], "refresh_every": 1},
    {"kind": "negative-curvature", "base": "SGD"},
]


@pytest.mark.parametrize("block", DRAWING, ids=lambda block: block["kind"])
def test_what_an_optimiser_draws_is_the_runs_own(block):
    """No draw of one seed is one of another's; a seed in the config wins; the same seed draws the same."""
    by_seed = [drawn(block, seed) for seed in range(3)]
    every = [one for draws in by_seed for one in draws]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    assert all(torch.equal(a, b) for a, b in zip(drawn(block, 1), by_seed[1], strict=True))
    fixed = [drawn({**block, "seed": 7}, seed)[0] for seed in range(2)]
    assert torch.equal(*fixed)
    following = [drawn({**block, "seed": seed}, 0) for seed in (7, 8)]
    assert not torch.equal(following[0][-1], following[1][0])


def test_seeds_of_different_purposes_differ():
    seeds = {derived_seed(s, p, n) for s in range(3) for p in ("order", "augment", "dropout") for n in range(3)}
    assert len(seeds) == 27


@pytest.mark.parametrize(
    "loss",
    [
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 1.0], dtype=torch.float64)),
        torch.nn.CrossEntropyLoss(ignore_index=0),
        torch.nn.CrossEntropyLoss(reduction="sum"),
        torch.nn.NLLLoss(weight=torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64), ignore_index=2),
    ],
)
def test_an_evaluation_in_parts_is_the_loss_of_the_whole(loss):
    """Labels in order, so that the parts differ: of the first 1,000 examples none may count."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(3100, 4, dtype=torch.float64), torch.arange(3100) // 1034
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    value, accuracy = evaluate(model, SimpleNamespace(normalise=lambda x: x), Split(inputs, targets), get_loss(loss))
    outputs = model(inputs).detach()
    assert value == pytest.approx(float(loss(outputs, targets)), rel=1e-12)
    assert accuracy == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))


def test_a_folder_without_a_run_is_said_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="train it first"):
        RunRecord(tmp_path)


@pytest.mark.parametrize("lr", [0.05, 1e4], ids=["finished", "diverged"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
def test_how_often_scalars_are_read_changes_nothing(optimizer, lr, digits_dir, tmp_path, monkeypatch):
    """On a GPU they are read every 50 steps."""
    if ":" in optimizer["kind"]:
        pytest.importorskip(optimizer["kind"].split(":")[0])
    found = []
    for interval in (1, 3, 50):
        monkeypatch.setitem(loop.LOG_INTERVAL, "cpu", interval)
        task = {"epochs": 12, "evaluate_every": 7, "checkpoints": [2]}
        found.append(train(spec(optimizer, lr=lr, task=task), digits_dir, tmp_path / str(interval), progress=False))
    assert len({record.status for record in found}) == 1
    if optimizer["name"] in ("sgd", "paper"):
        assert found[0].status == ("diverged" if lr > 1 else "finished")
    for other in found[1:]:
        assert other.steps == found[0].steps
        pd.testing.assert_frame_equal(without_clock(other.metrics), without_clock(found[0].metrics), check_exact=True)
        last = found[0].steps[-1]
        assert str(other.checkpoint(last)["model"]) == str(found[0].checkpoint(last)["model"])


def test_a_run_saved_between_two_readings_of_scalars_is_continued(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(loop.LOG_INTERVAL, "cpu", 50)
    whole = train(spec(OPTIMIZERS[3]), digits_dir, tmp_path / "whole", save_every_s=-1, progress=False)
    monkeypatch.setitem(loop.LOG_INTERVAL, "cpu", 1)
    other = train(spec(OPTIMIZERS[3]), digits_dir, tmp_path / "other", progress=False)
    pd.testing.assert_frame_equal(without_clock(other.metrics), without_clock(whole.metrics), check_exact=True)


def test_a_block_of_the_config_is_taken_apart_in_one_place():
    block = Block.of({"name": "mine", "kind": "sgd", "momentum": 0.9})
    assert (block.name, block.kind, block.options) == ("mine", "sgd", {"momentum": 0.9})
    assert Block.of({"kind": "sgd"}).name == "sgd"
    with pytest.raises(ValueError, match="needs a kind"):
        Block.of({"name": "mine"})
