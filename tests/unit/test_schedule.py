"""Schedules against torch's schedulers, the running mean of weights against its sum, both through a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from curvspace.training.average import accumulate, averaged
from curvspace.training.loop import evaluate
from curvspace.training.run import train
from curvspace.training.schedule import Schedule
from curvspace.training.spec import RunSpec, Task


def ours(schedule: Schedule, total: int, per_epoch: int = 10) -> list[float]:
    return [schedule.factor(step, total, per_epoch) for step in range(total)]


def torchs(build, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = build(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total", [7, 40, 101])
def test_schedules_are_torchs(total: int) -> None:
    half = total // 2
    cases = {
        Schedule(): lambda o: lr_scheduler.ConstantLR(o, 1.0),
        Schedule("cosine"): lambda o: lr_scheduler.CosineAnnealingLR(o, total),
        Schedule("linear"): lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total),
        Schedule("per-epoch", decay=0.5): lambda o: lr_scheduler.ExponentialLR(o, 0.5 ** (1 / 10)),
        Schedule("one-cycle"): lambda o: lr_scheduler.OneCycleLR(o, 1.0, total, cycle_momentum=False),
        Schedule("one-cycle", warmup=0.5): lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, total, pct_start=0.5, cycle_momentum=False
        ),
        Schedule("cosine", warmup=half / total): lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 1 / half, 1.0, half - 1), lr_scheduler.CosineAnnealingLR(o, total - half)],
            [half],
        ),
    }
    for schedule, build in cases.items():
        np.testing.assert_allclose(
            ours(schedule, total), torchs(build, total), rtol=0, atol=1e-12, err_msg=str(schedule)
        )


def test_the_warm_up_rises_to_one_and_short_runs_have_finite_rates() -> None:
    rates = ours(Schedule("constant", warmup=0.25), 40)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:]) == {1.0}
    for kind in ("constant", "linear", "cosine", "one-cycle"):
        for total in (1, 2, 3):
            assert all(0 < rate <= 1 for rate in ours(Schedule(kind, warmup=0.9), total)), (kind, total)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "cosin"}, "kind must be one of .* got 'cosin'"),
        ({"kind": "one_cycle"}, "one-cycle"),
        ({"kind": "cosine", "warmup": 1.0}, r"warmup must be a share .* got 1.0"),
        ({"kind": "cosine", "warmup": 5}, "got 5"),
        ({"kind": "cosine", "decay": 0.5}, "decay belongs to kind per-epoch"),
        ({"kind": "per-epoch"}, "decay belongs to kind per-epoch"),
        ({"kind": "per-epoch", "decay": 0}, "decay must be in"),
        ({"kind": "one-cycle", "warmup": 0}, "positive for one-cycle"),
        ({"kind": "cosine", "warm_up": 0.1}, "unknown key 'warm_up'"),
    ],
)
def test_a_wrong_schedule_is_refused_by_name(block: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(schedule=block)


def test_the_old_name_of_the_decay_is_refused_with_the_new_one() -> None:
    with pytest.raises(ValueError, match=r"task.schedule: \{kind: per-epoch"):
        RunSpec.from_dict({"task": {"lr_decay_per_epoch": 0.5}})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2])
def test_a_wrong_average_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="evaluate_average"):
        Task(evaluate_average=value)


def test_the_running_mean_is_its_sum_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model, average, beta = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), {}, 0.8
    seen = []
    for step in range(1, 8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(6, 3, dtype=torch.float64))
        accumulate(average, model, beta, step)
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
    weights = np.array([beta ** (7 - i) for i in range(1, 8)]) * (1 - beta) / (1 - beta**7)
    assert weights.sum() == pytest.approx(1)
    assert "1.num_batches_tracked" not in average
    with averaged(model, average):
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected = sum(w * t[name] for w, t in zip(weights, seen, strict=True))
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[-1][name])


def test_a_run_logs_its_rates_and_the_mean_weights(digits_dir, tmp_path) -> None:
    schedule = {"kind": "cosine", "warmup": 0.2}
    values = {
        "dataset": {"name": "digits-600", "source": "digits", "train": 600, "validation": 200},
        "model": {"name": "fc", "kind": "fc", "widths": [12]},
        "optimizer": {"name": "sgd", "kind": "sgd", "momentum": 0.9, "nesterov": True},
        "task": {"epochs": 2, "schedule": schedule, "evaluate_average": 0.5},
        "batch_size": 128,
        "lr": 0.2,
    }
    record = train(RunSpec.from_dict(values), digits_dir, tmp_path / "run", progress=False)
    rates = [0.2 * rate for rate in ours(Schedule.of(schedule), 10, 5)]
    assert record.metrics.learning_rate[1:].tolist() == pytest.approx(rates)
    last = record.metrics.iloc[-1]
    assert np.isfinite(last.average_val_loss)
    assert last.average_val_loss != last.val_loss
    data = record.dataset(digits_dir)
    model = record.build_model(data)
    model.load_state_dict({**model.state_dict(), **record.checkpoint(10)["average"]})
    from curvspace.losses import get_loss

    assert evaluate(model, data, data.validation, get_loss("cross_entropy"))[0] == pytest.approx(last.average_val_loss)
