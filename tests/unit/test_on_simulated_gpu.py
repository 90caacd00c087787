"""On a second device: nothing mixes devices, numbers are the CPU's, few steps wait for the device.

Where there is a GPU, what takes the fixture ``device`` runs on it; elsewhere on a simulated one, which does not have
torch's GPU kernels: see ``make gpu-check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import arpack_on_ours
from benchmarks.rows import _accuracy
from curvspace import LossScanner, Objective, class_gradients, eigsh, spectral_density
from curvspace.arithmetic import full_float32
from curvspace.curvature import (
    SubspaceTracker,
    cross_class_gradients,
    dense_eigh,
    gram_eigh,
    hutchpp,
    preconditioned,
    projected_gauss_newton,
)
from curvspace.curvature.class_gradients import split_pass, vjp_pass
from curvspace.datasets import DataSet, Split
from curvspace.landscape import fit_quadratic, line_search
from curvspace.monitor import CurvatureMonitor
from curvspace.optim import FirstOrder, build
from curvspace.optim.registry import KINDS
from curvspace.subspace import cosine_assignment, gradient_fraction, principal_angles, union_rank
from curvspace.training.loop import fit
from curvspace.training.spec import Task
from tests.unit import simulated_gpu
from tests.unit.simulated_gpu import GPU, OnGPU, on_gpu
from tests.unit.simulated_gpu import simulated_gpu as present
from tests.unit.small_networks import C, batches, small_network

Place = Callable[[Any], Any]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double().eval()


def images(n: int = 10) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)


def columns(rows: int, count: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(2)).double()


def home(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, list | tuple):
        return [home(v) for v in value]
    return {k: home(v) for k, v in value.items()} if isinstance(value, dict) else value


def same(a: Any, b: Any, close: float) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=close if a.dtype == torch.float32 else 1e-3 * close, atol=1e-7)
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            same(x, y, close)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        same(list(a.values()), list(b.values()), close)
    else:
        assert a == b or (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, rel=close, abs=1e-9)


def agree(device: torch.device, quantity: Callable[[Place], Any]) -> None:
    """The quantity of what is on the second device has the same numbers as of what is on the CPU."""
    simulated = device.type == "cpu"
    if simulated and torch.cuda.is_available():
        pytest.skip("a real one is there")
    expected = home(quantity(lambda value: value))
    if simulated:
        with present():
            found = home(quantity(on_gpu))
    else:
        with full_float32(device):
            found = home(quantity(lambda value: moved(value, device)))
    same(expected, found, 1e-6 if simulated else 1e-3)


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(moved(v, device) for v in value)
    return value.to(device)


def test_the_simulation_refuses_what_a_gpu_refuses(gpu):
    x = on_gpu(torch.randn(3, 4))
    assert isinstance(x, OnGPU)
    assert x.device == torch.zeros(2, device=GPU).device == torch.randn_like(x).device == GPU
    for mix in (lambda: x + torch.ones(4), lambda: x @ torch.ones(4), lambda: torch.cat([x, torch.ones(1, 4)])):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="cpu"):
        x.numpy()
    assert (x + torch.tensor(1.0)).device == GPU  # a number may lie anywhere, and an index
    assert x[torch.tensor([0, 2])].shape == (2, 4)
    simulated_gpu.waits.clear()
    assert float(x.sum()) == pytest.approx(sum(x.cpu().flatten().tolist()), rel=1e-5)
    assert sum(simulated_gpu.waits.values()) == 2


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "hessian_by_differences", "empirical_fisher"])
def test_products(device, kind, batch_norm):
    """Eleven vectors: eight together, then three."""
    if kind == "empirical_fisher" and batch_norm == "batch":
        pytest.skip("the examples are not apart")

    def quantity(place: Place) -> Any:
        objective = Objective(place(convolutional()), place(images()), batch_norm=batch_norm)
        count = 2 if kind == "hessian_by_differences" else 11
        found = getattr(objective, kind)() @ place(columns(objective.num_parameters, count))
        return [objective.loss(), objective.gradient(), found]

    agree(device, quantity)


@pytest.mark.parametrize("microbatch", [None, 4])
def test_data_may_stay_on_the_cpu(device, microbatch):
    def quantity(place: Place) -> Any:
        objective = Objective(place(convolutional()), images(), microbatch=microbatch)
        weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
        other = Objective(place(convolutional()), images(), weighted)
        v = torch.ones(objective.num_parameters).double()
        classes = class_gradients(place(convolutional()), *images(), 3)
        return [objective.gradient(), objective.hessian() @ v, other.gradient(), other.gauss_newton() @ v, classes]

    agree(device, quantity)


def test_a_loss_of_the_users(device):
    def quantity(place: Place) -> Any:
        objective = Objective(place(small_network()), place(batches(2)), lambda z, y: z.logsumexp(1).mean() + z.var())
        v = place(columns(objective.num_parameters, 1)[:, 0])
        return [objective.gradient(), objective.hessian() @ v, objective.gauss_newton() @ v]

    agree(device, quantity)


def test_spectra(device):
    def quantity(place: Place) -> Any:
        objective = Objective(place(small_network()), place(batches(2, n=8)))
        H = objective.hessian()
        pairs = eigsh(H, 3, tol=1e-7, max_basis=16)
        again = SubspaceTracker(3, tol=1e-7)
        tracked = [again.update(H).values, again.update(H).values]
        gram = gram_eigh(objective.gauss_newton())
        density = spectral_density(H, steps=6, probes=2)
        assert str(pairs).startswith("  i")
        return [pairs.values, pairs.vectors.abs(), tracked, gram[0], density.density, hutchpp(H, 12).value]

    agree(device, quantity)


def test_the_whole_matrix(device):
    agree(device, lambda place: dense_eigh(Objective(place(small_network()), place(batches(1, n=6))).gauss_newton())[0])


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_class_gradients(device, batch_norm):
    def quantity(place: Place) -> Any:
        model, (x, y) = place(convolutional()), place(images())
        Q = place(columns(sum(p.numel() for p in model.parameters()), 2))
        passes = [f(model, x, y, 3) for f in (split_pass, vjp_pass)]
        return [
            class_gradients(model, x, y, 3, batch_norm=batch_norm),
            cross_class_gradients(model, x, y, 3, batch_norm=batch_norm),
            projected_gauss_newton(model, x, y, "cross_entropy", Q, batch_norm=batch_norm),
            [[p.loss, p.gradient, p.class_gradients, p.counts, p.probabilities] for p in passes],
        ]

    agree(device, quantity)


def test_measures(device):
    def quantity(place: Place) -> Any:
        V, E, g = place([columns(50, 3), columns(50, 5)[:, 2:], columns(50, 6)[:, 5]])
        assigned = cosine_assignment(V, E, null_samples=2)
        scanner = LossScanner(Objective(place(small_network()), place(batches(1))))
        u = place(columns(len(scanner.origin), 1)[:, 0])
        u = u / u.norm()
        found = [fit_quadratic(scanner, u, 0.1, 5).curvature, line_search(scanner, u, 1.0, 4).t]
        together = LossScanner(Objective(place(small_network()), place(batches(1))), "vmap").along(u, [0.0, 0.1])
        return [
            *[gradient_fraction(g, V), principal_angles(V, E), union_rank(V, E).singular_values],
            *[assigned.mean, assigned.null, found, together.tolist()],
        ]

    agree(device, quantity)


def test_the_monitor(device):
    def quantity(place: Place) -> Any:
        monitor = CurvatureMonitor(place(small_network()), place(batches(1, n=8)), k=2, num_classes=C, share=None)
        return {k: v for k, v in monitor.measure(0).items() if k not in ("wall_s", "measure_s", "overhead")}

    agree(device, quantity)


def test_the_benchmarks_row_of_arpack(device):
    def quantity(place: Place) -> Any:
        model, ((x, y),) = place(small_network().float()), place([(x.float(), y) for x, y in batches(1)])
        exact = Objective(model, (x, y), dtype=torch.float64).hessian()
        return _accuracy(exact, arpack_on_ours(model, x, y, 2, "LA", 1e-3), "LA")["value_first"]

    agree(device, quantity)


def test_the_matrix_that_an_optimiser_sees(device):
    def quantity(place: Place) -> Any:
        model, ((x, y),) = place(small_network()), place(batches(1))
        optimizer = FirstOrder(model, torch.optim.Adam, lr=0.1)
        optimizer.step(x, y)
        operator = preconditioned(Objective(model, (x, y)).hessian(), optimizer.inner)
        return operator @ place(columns(operator.shape[0], 1)[:, 0])

    agree(device, quantity)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS if kind not in ("muon", "span-filter", "levenberg-marquardt", "dominant-sgd")),
    ("class-gradient-newton", {"orthonormal": False, "sequential": True, "estimate": "gauss-newton"}),
    ("class-gradient-newton", {"orthonormal": "symmetric", "estimate": "hessian", "fraction": 0.5}),
    ("rayleigh-ritz-newton", {"damping": "adaptive", "past_updates": 2, "cospace": "adam", "refresh_every": 2}),
    ("rayleigh-ritz-newton", {"curvature": "hessian", "curvature_gamma": 0.5, "refresh_every": 1}),
    ("fosi", {"k": 2, "smallest": 1, "refresh_every": 2}),
    ("bsfa", {"k": 1, "window": 3, "refresh_every": 2}),
    ("curveball", {"rho": 0.9, "beta": 0.1, "weight_decay": 0.1}),
    ("negative-curvature", {"base": "Adam", "every": 2}),
    ("span-filter", {"base": {"kind": "adam"}, "refresh_every": 2, "gain": 0.5, "beta": 0.9}),
    ("span-filter", {"base": {"kind": "sgd"}, "refresh_every": 2, "spans": ["mean-directions", "past-updates"]}),
    ("span-filter", {"base": {"kind": "sgd"}, "refresh_every": 2, "spans": ["mean-directions", "random-directions"]}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[f"{kind} {options}" for kind, options in OPTIONS])
def test_steps_and_states(device, kind, options):
    if device.type != "cpu" and "random-directions" in options.get("spans", []):
        pytest.skip("each kind of device draws in its own way")

    def quantity(place: Place) -> Any:
        model, data = place(small_network()), place(batches(4, n=8))
        torch.manual_seed(0)
        optimizer = build(kind, options, model, C, lr=0.05)
        losses = [optimizer.step(x, y) for x, y in data[:3]]
        other = build(kind, options, model, C, lr=0.05)
        other.load_state_dict(optimizer.state_dict())
        losses.append(other.step(*data[3]))
        return [losses, *model.parameters(), [float(value) for value in optimizer.log().values()]]

    agree(device, quantity)


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[f"{kind} {options}" for kind, options in OPTIONS])
@pytest.mark.parametrize("there", [True, False])
def test_a_state_goes_to_another_device(gpu, there, kind, options):
    places = (lambda value: value, on_gpu)
    first, second = places if there else places[::-1]
    data, model = batches(3, n=8), small_network()
    weights = list(first(model).parameters())
    optimizer = build(kind, options, model, C, lr=0.05)
    for x, y in data[:2]:
        optimizer.step(*first([x, y]))
    other_model = small_network()
    with torch.no_grad():
        for p, q in zip(other_model.parameters(), weights, strict=True):
            p.copy_(q.detach().cpu())
    other = build(kind, options, second(other_model), C, lr=0.05)
    other.load_state_dict(optimizer.state_dict())
    same(home(optimizer.step(*first(list(data[2])))), home(other.step(*second(list(data[2])))), 1e-6)
    same(home(list(model.parameters())), home(list(other_model.parameters())), 1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        *((kind, {}, 0) for kind in ("sgd", "adam", "curveball", "negative-curvature", "gradient-centralisation")),
        ("rayleigh-ritz-newton", {}, 0),  # between refreshes
        ("span-filter", {"base": {"kind": "sgd"}}, 0),
        ("class-gradient-newton", {}, 1),  # how many examples each class has
        ("span-filter", {"base": {"kind": "sgd"}, "refresh_every": 1}, 1),
    ],
)
def test_how_often_a_step_waits_for_the_device(gpu, kind, options, most):
    model = on_gpu(small_network())
    optimizer = build(kind, options, model, C, lr=0.05)
    for x, y in on_gpu(batches(5)):  # the first steps try what holds of the model
        simulated_gpu.waits.clear()
        optimizer.step(x, y)
    del simulated_gpu.waits["from the host"]
    assert sum(simulated_gpu.waits.values()) <= most, simulated_gpu.waits


def test_step_numbers_that_were_read_to_the_device_are_counted_on_the_host_again(gpu):
    """torch keeps them where a state dict has them, and would wait for each parameter's."""
    model, data = on_gpu(small_network()), on_gpu(batches(2))
    optimizer = FirstOrder(model, torch.optim.Adam, lr=0.1)
    optimizer.step(*data[0])
    state = optimizer.state_dict()
    for entry in state["state"].values():
        assert not isinstance(entry["step"], OnGPU)
        entry["step"] = on_gpu(entry["step"])
    optimizer.load_state_dict(state)
    simulated_gpu.waits.clear()
    optimizer.step(*data[1])
    assert not simulated_gpu.waits


@pytest.mark.parametrize("kind", ["sgd", "curveball"])
def test_training(device, kind):
    def quantity(place: Place) -> Any:
        g = torch.Generator().manual_seed(0)

        def split(n: int) -> Split:
            pixels = torch.randint(0, 255, (n, 1, 8, 8), generator=g, dtype=torch.uint8)
            return Split(*place([pixels, torch.randint(0, 3, (n,), generator=g)]))

        mean, std = (place(torch.full((1, 1, 1), value)) for value in (0.5, 0.2))
        data = DataSet("made here", split(24), split(10), split(4), 3, mean, std, (1, 8, 8))
        torch.manual_seed(0)
        model = place(nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3)))
        augment = "none" if device.type != "cpu" else "crop-flip"  # a real one draws in its own way
        task = Task(epochs=1, augment=augment, evaluate_average=0.9, memory_format="channels-last")
        state = fit(model, build(kind, {}, model, 3, lr=0.05), data, task, 12, 0, progress=False)
        return [{k: v for k, v in row.items() if k not in ("wall_s", "seconds")} for row in state.rows]

    agree(device, quantity)
