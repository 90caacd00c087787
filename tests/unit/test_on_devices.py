"""What must hold on every device: right against independent evidence, the same as on the CPU, the same twice.

Each test takes the fixture ``device``: the CPU, and a GPU where there is one (marked ``gpu``).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvspace import Objective
from curvspace import device as devices
from curvspace.curvature import eigsh, hutchpp, spectral_density
from curvspace.curvature.class_gradients import class_gradients
from curvspace.curvature.memory import default_budget
from curvspace.optim import build
from curvspace.optim.registry import KINDS
from tests.unit.layers import LAYERS, problem
from tests.unit.oracles import central_difference, dense_hessian
from tests.unit.small_networks import C, batches, deep_network, small_network

pytestmark = pytest.mark.usefixtures("reproducible")
DRAWING = {"rayleigh-ritz-newton", "low-rank-newton", "bulk-sgd", "dominant-sgd", "fosi", "nudged-sgd", "bsfa"}
"""Optimisers whose eigensolver starts from a random vector, which each device draws in its own way."""


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
        model, x, y = problem(*LAYERS[name])
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


def stepped(kind: str, device: torch.device, steps: int = 4) -> tuple[list[float], Tensor]:
    """Losses before each step, and the parameters at the end, on the CPU."""
    model, data = deep_network().to(device, torch.float64), on(device, batches(steps))
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
