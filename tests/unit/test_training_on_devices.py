"""Training on every device: the same twice, after an interruption, and on another device.

Tests that take the fixture ``device`` run on the CPU, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from curvspace import datasets
from curvspace.datasets.augment import crop_flip
from curvspace.errors import UserError
from curvspace.losses import get_loss
from curvspace.training import run
from curvspace.training.loop import evaluate
from curvspace.training.record import RunRecord, initial_model
from curvspace.training.run import Interrupted, train
from curvspace.training.spec import RunSpec

pytestmark = pytest.mark.usefixtures("reproducible")
OPTIONS: dict[str, dict[str, object]] = {"class-gradient-newton": {"damping": 10.0}}
OPTIMIZERS = ["sgd", "adam", "class-gradient-newton", "curveball", "rayleigh-ritz-newton"]


def spec(device: torch.device | str, kind: str = "sgd", **changes) -> RunSpec:
    values = {
        "dataset": {"name": "digits", "source": "digits", "train": 300, "validation": 100},
        "model": {"name": "lenet", "kind": "lenet", "channels": [2, 4], "dense": 8},
        "optimizer": {"name": kind, "kind": kind, **OPTIONS.get(kind, {})},
        "task": {"epochs": 2, "checkpoints": [0, 3], "augment": "crop-flip"},
        "batch_size": 64,
        "lr": 0.05,
        **changes,
    }
    return RunSpec.from_dict(values).on(str(device))


def without_clock(record: RunRecord) -> pd.DataFrame:
    return record.metrics.drop(columns=["wall_s", "seconds"])


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next training stop after so many steps, as a signal would."""
    real = run.fit

    def fit(*args, after_step, **kwargs):
        def stopping(state):
            after_step(state)
            if state.step == step:
                raise Interrupted("stopped")

        monkeypatch.setattr(run, "fit", real)
        return real(*args, after_step=stopping, **kwargs)

    monkeypatch.setattr(run, "fit", fit)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_is_the_same_twice_and_after_an_interruption(device, kind, digits_dir, tmp_path, monkeypatch):
    whole = train(spec(device, kind), digits_dir, tmp_path / "whole", progress=False)
    again = train(spec(device, kind), digits_dir, tmp_path / "again", progress=False)
    stopping_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        train(spec(device, kind), digits_dir, tmp_path / "broken", save_every_s=-1, progress=False)
    broken = train(spec(device, kind), digits_dir, tmp_path / "broken", progress=False)
    for other in (again, broken):
        pd.testing.assert_frame_equal(without_clock(whole), without_clock(other), check_exact=True)
        last = whole.steps[-1]
        weights, others = whole.checkpoint(last)["model"], other.checkpoint(last)["model"]
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_run_is_continued_on_another_device(device, there_and_back, digits_dir, tmp_path, monkeypatch):
    first, second = ("cpu", str(device)) if there_and_back else (str(device), "cpu")
    reference = train(spec("cpu", "curveball"), digits_dir, tmp_path / "reference", progress=False)
    stopping_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        train(spec(first, "curveball"), digits_dir, tmp_path / "run", save_every_s=-1, progress=False)
    assert (tmp_path / "run.state" / "resume.pt").is_file()
    record = train(spec(second, "curveball"), digits_dir, tmp_path / "run", progress=False)
    assert record.record["devices"] == list(dict.fromkeys([first, second]))
    assert record.metrics["step"].tolist() == list(range(11))
    augmented = device.type == "cuda"  # each kind of device draws the crops in its own way
    tolerance = {"rtol": 0.5} if augmented else {"rtol": 1e-12}
    pd.testing.assert_series_equal(record.metrics["val_loss"], reference.metrics["val_loss"], **tolerance)


def test_what_a_run_is_does_not_depend_on_the_device():
    keys = {run._key(spec(name), "code", "data") for name in ("cpu", "cuda", "cuda:0", "cuda:3")}
    assert len(keys) == 1
    assert run._key(spec("cpu", lr=0.1), "code", "data") not in keys
    assert run._key(spec("cpu"), "code", "other data") not in keys


def test_a_run_diverges_at_the_step_at_which_it_does_on_the_cpu(device, digits_dir, tmp_path):
    plain = {"epochs": 20, "evaluate_every": 45, "checkpoint_every": 50}
    found = [
        train(spec(name, lr=8.0, task=plain), digits_dir, tmp_path / str(i), progress=False)
        for i, name in enumerate(("cpu", device))
    ]
    assert [record.status for record in found] == ["diverged", "diverged"]
    assert found[0].steps == found[1].steps
    assert len(found[0].metrics) == len(found[1].metrics)


@pytest.mark.parametrize(
    "options",
    [{"memory_format": "channels-last"}, {"precision": "bfloat16"}, {"compile": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_speed_train_nearly_the_same_network(device, options, digits_dir, tmp_path, monkeypatch):
    if device.type == "cpu":  # minutes of a C++ compiler otherwise
        real = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda model: real(model, backend="aot_eager"))
    plain = {"epochs": 2, "checkpoints": [0]}
    reference = train(spec(device, task=plain), digits_dir, tmp_path / "plain", progress=False)
    found = train(spec(device, task={**plain, **options}), digits_dir, tmp_path / "fast", progress=False)
    close = 0.05 if "precision" in options else 1e-3
    a, b = (record.metrics["train_loss"].iloc[1:] for record in (found, reference))
    assert a.to_numpy() == pytest.approx(b.to_numpy(), rel=close)
    assert {v.dtype for v in found.checkpoint(10)["model"].values()} == {torch.float32}
    assert found.checkpoint(10)["model"].keys() == reference.checkpoint(10)["model"].keys()
    if "precision" in options:
        assert not a.equals(b), "the option did nothing"


@pytest.mark.parametrize("kind", ["class-gradient-newton", "curveball", "rayleigh-ritz-newton", "negative-curvature"])
def test_channels_last_is_for_all_optimisers_and_the_others_are_refused_in_one_line(kind, device, digits_dir, tmp_path):
    plain = {"epochs": 1, "max_steps": 3}
    reference = train(spec(device, kind, task=plain), digits_dir, tmp_path / "plain", progress=False)
    fast = {**plain, "memory_format": "channels-last"}
    found = train(spec(device, kind, task=fast), digits_dir, tmp_path / "fast", progress=False)
    a, b = (record.metrics["train_loss"].iloc[1:].to_numpy() for record in (found, reference))
    assert a == pytest.approx(b, rel=1e-2)
    for option in ({"precision": "bfloat16"}, {"compile": True}):
        with pytest.raises(UserError, match=f"task.{next(iter(option))}.*first-order") as error:
            train(spec(device, kind, task={**plain, **option}), digits_dir, tmp_path / "no", progress=False)
        assert len(str(error.value).splitlines()) == 1


def test_wrong_options_of_speed_are_refused_by_name():
    for option in ({"precision": "float16"}, {"memory_format": "nhwc"}, {"compile": "yes"}):
        with pytest.raises(ValueError, match=f"task.{next(iter(option))} must be one of"):
            spec("cpu", task={"epochs": 1, **option})


def test_evaluation_and_checkpoints_are_the_same_on_another_device(device, digits_dir, tmp_path):
    record = train(spec(device), digits_dir, tmp_path / "run", progress=False)
    data = record.dataset(digits_dir)
    loss = get_loss("cross_entropy")
    here = evaluate(record.model(10, data, "cpu"), data, data.validation, loss)
    there = evaluate(record.model(10, data, device), data.to(device), data.to(device).validation, loss)
    assert here == pytest.approx(there, rel=1e-5)
    assert here[0] == pytest.approx(record.metrics["val_loss"].iloc[-1], rel=1e-5)


def test_a_new_model_leaves_the_generators_as_they_were(device, digits_dir):
    data = datasets.load(digits_dir, {"source": "digits"})
    before = torch.randn(3, device=device), copy.copy(torch.get_rng_state())
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    models = [initial_model({"kind": "fc", "widths": [4]}, data, seed) for seed in (0, 0, 1)]
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)
    assert torch.equal(before[1], torch.get_rng_state())
    weights = [next(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_augmentation_moves_pixels_and_invents_none(device):
    x = torch.randint(1, 255, (50, 3, 9, 7), dtype=torch.uint8, device=device)
    generator = torch.Generator(device=device).manual_seed(3)
    first = crop_flip(x, generator, padding=2)
    assert torch.equal(first, crop_flip(x, torch.Generator(device=device).manual_seed(3), padding=2))
    for before, after in zip(x.cpu(), first.cpu(), strict=True):
        kept = after[0][after[0] > 0]
        assert len(kept) >= 5 * 3
        assert set(kept.tolist()) <= set(before[0].flatten().tolist())


def test_training_works_on_the_data_where_it_is(device, digits_dir: Path):
    data = datasets.load(digits_dir, {"source": "digits"}).to(device)
    assert {t.device.type for t in (data.train.inputs, data.validation.targets, data.test.inputs, data.mean)} == {
        device.type
    }
