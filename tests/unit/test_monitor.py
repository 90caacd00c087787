"""The monitor beside a plain training: right, unseen by the training, within its budget, to every sink."""

from __future__ import annotations

import copy
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from curvspace.monitor import CSVSink, CurvatureMonitor, TensorBoardSink, WandbSink
from curvspace.monitor.budget import Budget
from tests.unit import oracles


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, generator=generator).double(), torch.randint(3, (n,), generator=generator)) for n in (12, 7)
    ]


def test_a_row_is_what_dense_matrices_say():
    model = network()
    monitor = CurvatureMonitor(model, batches(), k=3, num_classes=3, tol=1e-9, most_negative=True, max_products=2000)
    row = monitor.measure(7)
    model[2].p = 0.0
    values, vectors = torch.linalg.eigh(oracles.dense_hessian(model, batches(), "cross_entropy"))
    g = oracles.flat_gradient(oracles.total_loss(model, batches(), "cross_entropy"), oracles.trainable(model))
    top = vectors[:, -3:]
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    z = model(x)
    c = torch.stack([oracles.flat_gradient(z[y == k, k].mean(), oracles.trainable(model), keep=True) for k in range(3)])
    span = torch.linalg.qr(c.T)[0]
    cosines = torch.linalg.svdvals(span.T @ top)
    expected = {
        "step": 7,
        "sharpness": values[-1],
        "eigenvalue_2": values[-2],
        "eigenvalue_3": values[-3],
        "most_negative": values[0],
        "gradient_norm": g.norm(),
        "f_top": (top.T @ g).square().sum() / g.square().sum(),
        "f_chance": 3 / len(g),
        "f_class": (span.T @ g).square().sum() / g.square().sum(),
        "class_overlap": (span.T @ top).square().sum() / 3,
        "class_angle_first_deg": torch.rad2deg(torch.arccos(cosines[0])),
        "class_angle_last_deg": torch.rad2deg(torch.arccos(cosines[-1])),
        "converged": 1,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-6, abs=1e-9), name
    assert math.isnan(row["overlap_with_last"])
    again = monitor.measure(8)
    assert again["overlap_with_last"] == pytest.approx(1, abs=1e-6)
    assert again["products"] < row["products"] / 2  # warm


def state_of(model: nn.Module) -> list[object]:
    generators = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002
    tensors = [t.clone() for t in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [generators, [m.training for m in model.modules()], tensors, grads]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", ["plain", "no_grad", "autocast"])
def test_nothing_of_the_training_is_touched(training, context):
    model = network(norm=True).float().train(training)
    data = [(x.float(), y) for x, y in batches()]
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    identities = [id(p) for p in model.parameters()]
    before = state_of(model)
    monitor = CurvatureMonitor(model, data, num_classes=3, share=None, most_negative=True)
    inside = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "autocast": lambda: torch.autocast("cpu")}[context]
    with inside():
        row = monitor(1)
    assert row is not None
    plain = CurvatureMonitor(copy.deepcopy(model), data, share=None).measure(1)
    assert row["sharpness"] == pytest.approx(plain["sharpness"], rel=1e-4)  # autocast does not reach inside
    assert [id(p) for p in model.parameters()] == identities
    for old, new in zip(before, state_of(model), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_a_monitored_training_is_the_same_bit_for_bit(tmp_path):
    def train(monitored: bool) -> list[torch.Tensor]:
        model = network(norm=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = CurvatureMonitor(model, batches(), share=None, to=tmp_path / "c.csv") if monitored else None
        torch.manual_seed(3)
        for step in range(5):
            for x, y in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            if monitor:
                monitor(step)
        return list(model.state_dict().values())

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a, b)
    table = pd.read_csv(tmp_path / "c.csv")
    assert table["step"].tolist() == [0, 1, 2, 3, 4]
    assert table["loss"].notna().all()


def test_a_part_of_the_parameters_and_a_bare_pair():
    model = network()
    x, y = batches()[0]
    monitor = CurvatureMonitor(model, (x, y), k=2, num_classes=3, parameters="3.*", tol=1e-9)
    row = monitor.measure(0)
    model[2].p = 0.0
    block = oracles.dense_hessian(model, [(x, y)], "cross_entropy")[-21:, -21:]
    assert row["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-8)
    c = torch.stack([oracles.flat_gradient(model(x)[y == k, k].mean(), list(model[3].parameters())) for k in range(3)])
    g = oracles.flat_gradient(nn.functional.cross_entropy(model(x), y), list(model[3].parameters()))
    span = torch.linalg.qr(c.T)[0]
    assert row["f_class"] == pytest.approx(float((span.T @ g).square().sum() / g.square().sum()), rel=1e-8)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("cost", [0.2, 3.0])
def test_the_budget_keeps_to_its_share_and_uses_it(share, cost):
    clock = Clock()
    budget = Budget(share, clock)
    budget.expect(cost)
    budget.tick()
    measured = 0
    for _ in range(20_000):
        clock.now += 0.1
        if budget.tick():
            with budget.spending(typical=True):
                clock.now += cost
            measured += 1
        assert budget.spent_s <= share * budget.training_s + 1e-6
    assert budget.training_s == pytest.approx(2000)
    assert measured == pytest.approx(share * 2000 / cost, rel=0.1, abs=1)


def test_a_dearer_measurement_is_paid_back_and_a_pause_is_not_followed_by_a_burst():
    clock = Clock()
    budget = Budget(0.1, clock)
    budget.expect(1.0)
    budget.tick()
    clock.now += 10_000  # a pause
    assert budget.tick()
    with budget.spending(typical=True):
        clock.now += 5.0  # five times what was expected: credit is now -4
    waited = 0
    while not budget.tick():
        clock.now += 1
        waited += 1
    assert waited == pytest.approx(90, abs=1)  # 4 owed and 5 expected, at 0.1 a second


def test_columns_are_measured_on_the_users_steps_only():
    monitor = CurvatureMonitor(network(), batches(), share=None, every=3)
    assert [step for step in range(10) if monitor(step)] == [0, 3, 6, 9]


def test_layers_unfrozen_on_the_way():
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    monitor = CurvatureMonitor(model, batches(), k=2, share=None)
    first = monitor(0)
    for p in model[0].parameters():
        p.requires_grad_(True)
    second = monitor(1)
    assert first["f_chance"] == 2 / 21
    assert second["f_chance"] == 2 / 57
    assert math.isnan(second["overlap_with_last"])


def test_a_training_that_diverges_goes_on():
    model = network()
    monitor = CurvatureMonitor(model, batches(), share=None)
    good = monitor(0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    bad = monitor(1)
    assert math.isnan(bad["loss"])
    assert math.isnan(bad["sharpness"])
    assert list(bad) == list(good)


def test_mistakes_are_told_at_the_first_step():
    with pytest.raises(ValueError, match="k must be between 1 and P = 57, got 60"):
        CurvatureMonitor(network(), batches(), k=60)
    with pytest.raises(ValueError, match="share must be positive, or None"):
        CurvatureMonitor(network(), batches(), share=0)
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2"):
        CurvatureMonitor(network(), batches(), num_classes=1)
    with pytest.raises(ValueError, match="to must be a path"):
        CurvatureMonitor(network(), batches(), to=3)  # type: ignore[arg-type]
    wrong = [(x, y.double()) for x, y in batches()]
    with pytest.raises(ValueError, match="batch 0: the loss mse failed"):
        CurvatureMonitor(network(), wrong, loss="mse")(0)


def test_a_training_too_short_for_its_share_says_so():
    monitor = CurvatureMonitor(network(), batches(), share=1e-9)
    monitor(0)
    with pytest.warns(RuntimeWarning, match="no measurement fitted into 1e-09 of"):
        monitor.close()


def test_csv_is_never_overwritten_and_can_be_continued(tmp_path):
    path = tmp_path / "folder" / "c.csv"
    CurvatureMonitor(network(), batches(), to=path).measure(0)
    with pytest.raises(ValueError, match="is there already"):
        CurvatureMonitor(network(), batches(), to=path)
    CurvatureMonitor(network(), batches(), to=CSVSink(path, append=True)).measure(1)
    assert pd.read_csv(path)["step"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="has other columns than this monitor"):
        CurvatureMonitor(network(), batches(), k=2, to=CSVSink(path, append=True)).measure(2)


def test_tensorboard_and_a_sink_of_ones_own(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'curvspace[monitor]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Mine:
        def __init__(self) -> None:
            self.rows, self.closed = [], False

        def write(self, row):
            self.rows.append(row)

        def close(self):
            self.closed = True

    mine = Mine()
    with CurvatureMonitor(network(), batches(), to=[mine, TensorBoardSink(tmp_path)]) as monitor:
        rows = [monitor.measure(step) for step in (3, 5)]
    assert mine.rows == rows
    assert mine.closed
    events = EventAccumulator(str(tmp_path)).Reload()
    values = events.Scalars("curvature/sharpness")
    assert [v.step for v in values] == [3, 5]
    assert [v.value for v in values] == pytest.approx([r["sharpness"] for r in rows])


def test_wandb_offline(tmp_path: Path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'curvspace[monitor]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    sink = WandbSink(project="p")
    with CurvatureMonitor(network(), batches(), to=sink) as monitor:
        row = monitor.measure(4)
        summary = sink.run.summary
        assert sink.run.settings.mode == "offline"
        assert summary["curvature/step"] == 4
        assert summary["curvature/sharpness"] == pytest.approx(row["sharpness"])
    assert wandb.run is None
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_network_that_died_is_followed_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    monitor = CurvatureMonitor(model, [(torch.randn(30, 4), torch.arange(30) % 3)], k=2, num_classes=3, share=None)
    monitor(0)
    nn.init.constant_(model[0].bias, -100)
    row = monitor(1)
    assert row["gradient_norm"] == 0
    assert math.isnan(row["f_class"])


def test_a_budget_of_fewer_products_than_eigenvalues():
    torch.manual_seed(0)
    batch = torch.randn(30, 4), torch.arange(30) % 3
    row = CurvatureMonitor(nn.Linear(4, 3), [batch], k=3, max_products=1).measure(0)
    assert math.isfinite(row["sharpness"])
    assert math.isnan(row["eigenvalue_3"])
    assert not row["converged"]


@pytest.mark.parametrize("width", [3, 9])
def test_layers_that_grow_or_shrink_on_the_way(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    monitor = CurvatureMonitor(model, batches(), k=2, share=None, tol=1e-9)
    monitor(0)
    model[0], model[2] = nn.Linear(5, width).double(), nn.Linear(width, 3).double()
    expected = torch.linalg.eigvalsh(oracles.dense_hessian(model, batches(), "cross_entropy"))
    assert monitor(1)["sharpness"] == pytest.approx(float(expected[-1]))


def test_batches_from_a_generator_need_not_be_contiguous():
    x, y = torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()])
    rows = [
        CurvatureMonitor(network(), made, share=None).measure(0)
        for made in (((x[i::2], y[i::2]) for i in range(2)), [(x, y)])
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"])


@pytest.mark.parametrize("k", [1, 2])
def test_two_monitors_do_not_share_a_file(tmp_path, k):
    first, second = (CurvatureMonitor(network(), batches(), k=n, share=None, to=tmp_path / "a.csv") for n in (1, k))
    first(0)
    with pytest.raises(ValueError, match="is there already"):
        second(0)
    assert len(pd.read_csv(tmp_path / "a.csv")) == 1


def test_a_monitor_is_pickled_with_its_rows():
    monitor = CurvatureMonitor(network(), batches(), share=None)
    monitor(torch.tensor(3))
    assert pickle.loads(pickle.dumps(monitor)).rows[0]["step"] == 3
    assert type(monitor.rows[0]["step"]) is int


@pytest.mark.parametrize(
    "options", [{"k": 2.0}, {"every": "2"}, {"every": 0.5}, {"num_classes": 3.0}, {"share": "0.1"}, {"share": 0}]
)
def test_options_that_are_no_numbers_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        CurvatureMonitor(network(), batches(), **options)


def test_a_csv_file_that_ends_in_half_a_line_is_continued_without_it(tmp_path):
    path = tmp_path / "c.csv"
    monitor = CurvatureMonitor(network(), batches(), to=path)
    rows = [monitor.measure(step) for step in (0, 1)]
    whole = path.read_bytes()
    for left, steps in ((len(whole) - 20, [0, 2]), (30, [2])):  # half of the last row; half of the header
        path.write_bytes(whole[:left])
        CurvatureMonitor(network(), batches(), to=CSVSink(path, append=True)).measure(2)
        table = pd.read_csv(path)
        assert table["step"].tolist() == steps
        assert list(table) == list(rows[0])


def test_a_row_that_did_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "c.csv"
    sink, row = CSVSink(path), {"step": 0, "loss": 1.0}

    class Full:
        def __init__(self, file):
            self.file = file

        def writerows(self, rows):
            self.file.write("0,1")
            raise OSError(28, "No space left on device")

    for steps in ([0], [0, 1]):
        with monkeypatch.context() as patch:
            patch.setattr("csv.writer", Full)
            with pytest.raises(OSError, match="No space left"):
                sink.write(row)
        sink.write({**row, "step": steps[-1]})
        assert pd.read_csv(path)["step"].tolist() == steps
