"""What must hold on every device: right against independent evidence, the same as on the CPU, the same twice.

Each test takes the fixture ``device``: the CPU, and a GPU where there is one (marked ``gpu``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from curvspace import Objective, datasets
from curvspace import device as devices
from curvspace.curvature import eigsh, hutchpp, spectral_density
from curvspace.curvature.class_gradients import class_gradients
from curvspace.curvature.memory import default_budget
from curvspace.datasets.augment import crop_flip
from curvspace.errors import UserError
from curvspace.losses import get_loss
from curvspace.optim import build
from curvspace.optim.registry import KINDS
from curvspace.training import run
from curvspace.training.loop import evaluate
from curvspace.training.record import RunRecord, initial_model
from curvspace.training.run import Interrupted, train
from curvspace.training.spec import RunSpec
from tests.unit.oracles import central_difference, dense_hessian
from tests.unit.small_networks import C, batches, small_network
from tests.unit.test_layer_sweep import LAYERS, _problem

DRAWING = {"rayleigh-ritz-newton", "low-rank-newton", "bulk-sgd", "dominant-sgd", "fosi", "nudged-sgd", "bsfa"}
"""Optimisers whose eigensolver starts from a random vector, which each device draws in its own way."""
OPTIONS: dict[str, dict[str, object]] = {"class-gradient-newton": {"damping": 10.0}}
OPTIMIZERS = ["sgd", "adam", "class-gradient-newton", "curveball", "rayleigh-ritz-newton"]


@pytest.fixture(autouse=True)
def full_precision():
    with devices.reproducible():
        yield


def on(device: torch.device, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in pairs]


def convolutional(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, C)).double()


def images(count: int, n: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 2, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, C, (n,), generator=g))
        for _ in range(count)
    ]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list]]] = {
    "dense": (small_network, batches),
    "convolutional": (convolutional, images),
}
networks = pytest.mark.parametrize("network", NETWORKS)


@networks
def test_curvature_products_agree_with_central_differences(device, network):
    make, data = NETWORKS[network]
    model, pairs = make().to(device), on(device, data(2))
    objective = Objective(model, pairs)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(objective.num_parameters, 3, generator=generator, dtype=torch.float64).to(device)
    found = objective.hessian() @ v
    assert found.device.type == device.type
    expected = torch.stack([central_difference(model, pairs, "cross_entropy", w / w.norm()) * w.norm() for w in v.T], 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    reference = Objective(make(), data(2)).gauss_newton() @ v.cpu()
    torch.testing.assert_close((objective.gauss_newton() @ v).cpu(), reference, rtol=1e-9, atol=1e-11)


@networks
def test_eigenpairs_are_those_of_the_dense_hessian(device, network):
    make, data = NETWORKS[network]
    model, pairs = make().to(device), on(device, data(1))
    hessian = Objective(model, pairs).hessian()
    dense = torch.linalg.eigvalsh(dense_hessian(model, pairs, "cross_entropy"))
    for which, expected in (("LA", dense.flip(0)[:3]), ("SA", dense[:2])):
        found = eigsh(hessian, len(expected), which, tol=1e-8)
        assert found.vectors.device.type == device.type
        torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-8)
    trace = float(hutchpp(hessian, products=60, seed=0).value)
    assert trace == pytest.approx(float(dense.sum()), rel=0.3, abs=0.3)
    assert spectral_density(hessian, steps=10, probes=2).density.isfinite().all()


@networks
def test_class_gradients_are_the_gradients_of_the_mean_outputs(device, network):
    make, data = NETWORKS[network]
    model, ((x, y),) = make().to(device), on(device, data(1))
    found, counts = class_gradients(model, x, y, C)
    parameters = list(model.parameters())
    for k in range(C):
        if counts[k]:
            grads = torch.autograd.grad(model(x[y == k])[:, k].mean(), parameters)
            expected = torch.cat([g.reshape(-1) for g in grads])
            torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-11)


OWN_KERNELS = [
    *("batch norm", "layer norm", "weight norm", "batch norm 2d", "group norm", "local response norm", "max pooling"),
    *("average pooling", "adaptive pooling", "bilinear", "transposed convolution", "depthwise convolution"),
    *("convolution 1d", "LSTM", "two-way LSTM", "GRU", "RNN", "attention", "transformer layer", "embedding"),
]
"""Layers for which torch has other kernels on a GPU than on a CPU (cuDNN's, fused ones)."""


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OWN_KERNELS)
def test_layers_have_the_derivatives_that_they_have_on_the_cpu(device, name):
    """Eleven vectors: on a GPU eight together, then three. Modes: training for batch statistics, else evaluation."""
    if device.type == "cpu":
        pytest.skip("the sweep over all layers")
    found = []
    for place in ("cpu", device):
        model, x, y = _problem(*LAYERS[name])
        for m in model.modules():
            m.train(isinstance(m, nn.modules.batchnorm._BatchNorm))
        model, x, y = model.to(place), x.to(place), y.to(place)
        objective = Objective(model, (x, y))
        V = torch.randn(objective.num_parameters, 11, generator=torch.Generator().manual_seed(0)).double().to(place)
        parts = [objective.gradient(), objective.hessian() @ V, objective.gauss_newton() @ V]
        parts += [objective.hessian() @ V[:, 0], class_gradients(model, x, y, 3)[0]]
        optimizer = build("curveball", {}, model, 3, lr=1.0)
        parts += [optimizer.step(x, y), optimizer.step(x, y)]
        found.append([part.detach().cpu() for part in parts])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


def test_curvature_in_float32_has_its_digits_whatever_torch_allows(device, torchs_own_precision):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    products = []
    for dtype in (torch.float64, torch.float32):
        model = convolutional().to(device, dtype)
        objective = Objective(model, [(x.to(dtype), y) for x, y in on(device, images(1, 64))], dtype=dtype)
        v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        products.append([(A @ v).double() for A in (objective.hessian(), objective.gauss_newton())])
    for exact, found in zip(*products, strict=True):
        assert (found - exact).norm() < 1e-5 * exact.norm(), "TF32 would be off by 1e-3"


def test_a_batch_that_does_not_fit_is_cut(device):
    if device.type == "cpu":
        pytest.skip("its memory cannot be bounded")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 4000), nn.Tanh(), nn.Linear(4000, 3)).to(device)  # 640 MB of activations
    batch = torch.randn(20_000, 100, device=device), torch.arange(20_000, device=device) % 3
    v = torch.randn(sum(p.numel() for p in model.parameters()), 3, device=device)
    expected = [Objective(model, batch).gradient(), Objective(model, batch).hessian() @ v]
    torch.cuda.empty_cache()
    whole, held = torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((held + 500 * 2**20) / whole, device)
    try:
        with pytest.warns(RuntimeWarning, match="out of memory with 20000 examples"):
            found = [Objective(model, batch).gradient(), Objective(model, batch).hessian() @ v]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C)).double()


def stepped(kind: str, device: torch.device, steps: int = 4) -> tuple[list[float], Tensor]:
    """Losses before each step, and the parameters at the end, on the CPU."""
    model, data = deep().to(device), on(device, batches(steps))
    torch.manual_seed(0)
    options: dict[str, object] = {"base": {"kind": "adam"}} if kind == "span-filter" else {}
    optimizer = build(kind, options, model, C, lr=0.05)
    losses = [float(optimizer.step(x, y)) for x, y in data]
    assert all(isinstance(value, float) or value.device.type == device.type for value in optimizer.log().values())
    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser_steps_as_on_the_cpu_and_the_same_twice(device, kind):
    if kind == "muon":
        pytest.importorskip("pytorch_optimizer")
    losses, weights = stepped(kind, device)
    again = stepped(kind, device)
    assert again[0] == losses
    assert torch.equal(again[1], weights)
    reference = stepped(kind, torch.device("cpu"))
    assert losses[0] == pytest.approx(reference[0][0], rel=1e-9)
    if kind not in DRAWING | {"muon"}:
        torch.testing.assert_close(weights, reference[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["sgd", "class-gradient-newton", "curveball"])
def test_an_optimiser_continues_from_a_state_saved_on_another_device(device, kind, tmp_path):
    model = small_network()
    optimizer = build(kind, {}, model, C, lr=0.05)
    first, second = batches(2)
    optimizer.step(*first)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", map_location=device, weights_only=True)
    moved = small_network(seed=9).to(device)
    other = build(kind, {}, moved, C, lr=0.05)
    moved.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert float(other.step(*on(device, [second])[0])) == pytest.approx(float(optimizer.step(*second)), rel=1e-9)
    for p, q in zip(moved.parameters(), model.parameters(), strict=True):
        assert p.device.type == device.type
        torch.testing.assert_close(p.cpu(), q, rtol=1e-7, atol=1e-9)


def test_seconds_of_a_step_are_those_of_its_work(device):
    torch.manual_seed(0)
    size = 1024 if device.type == "cpu" else 8192
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(3))).to(device)
    optimizer = build("sgd", {}, model, size, lr=0.0)
    x, y = torch.randn(size, size, device=device), torch.zeros(size, dtype=torch.long, device=device)
    optimizer.step(x, y)
    before, start = optimizer.costs.seconds, time.perf_counter()
    optimizer.step(x, y)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    whole = time.perf_counter() - start
    assert 0.8 * whole <= optimizer.costs.seconds - before <= whole


# --- training -------------------------------------------------------------------------------------------------------


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
    assert found[1].metrics["eval_train_loss"].notna().iloc[-1] or found[1].status == "diverged"


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


def test_products_and_convolutions_have_float32s_digits(device):
    with devices.use(str(device)) as chosen:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
        exact = a.double() @ b.double()
        error = ((a.to(chosen) @ b.to(chosen)).cpu() - exact).abs().max() / exact.abs().max()
        assert error < 2e-6, "TF32 would be off by 1e-3"
        x, w = torch.randn(4, 16, 12, 12, generator=generator), torch.randn(8, 16, 3, 3, generator=generator)
        exact = nn.functional.conv2d(x.double(), w.double())
        error = (nn.functional.conv2d(x.to(chosen), w.to(chosen)).cpu() - exact).abs().max() / exact.abs().max()
        assert error < 2e-6


def test_there_is_memory_for_kept_graphs(device):
    assert default_budget(device) > 2**20


def test_training_works_on_the_data_where_it_is(device, digits_dir: Path):
    data = datasets.load(digits_dir, {"source": "digits"}).to(device)
    assert {t.device.type for t in (data.train.inputs, data.validation.targets, data.test.inputs, data.mean)} == {
        device.type
    }
