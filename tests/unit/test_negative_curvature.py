"""The optimiser of paper D's appendix C against dense Hessians and a saddle whose way out is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from curvspace.functional import assign_parameters, parameter_vector
from curvspace.optim.first_order import FirstOrder
from curvspace.optim.negative_curvature import NegativeCurvature
from tests.unit.backward_passes import OnceTanh
from tests.unit.small_networks import Fn


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(n: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (n,), generator=generator)


def gradient_and_dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in gradient
    ]
    return gradient.detach(), torch.stack(rows)


class Saddle(nn.Module):
    r"""``2 a^2 - b^2/4 + b^4/4`` at (a, b): a saddle at 0 from which b leads out, minima at b = ±1/√2."""

    def __init__(self, a: float = 1.0, b: float = 1e-3):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([a, b]))

    def forward(self, x: Tensor) -> Tensor:
        return self.point.expand(x.shape[0], 2)


def saddle_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    a, b = outputs.unbind(1)
    return (2 * a**2 - b**2 / 4 + b**4 / 4).mean()


def steps_to_escape(optimizer, model: Saddle, limit: int = 3000) -> int:
    x = torch.zeros(2, 1)
    for step in range(limit):
        if model.point[1].abs() > 0.5:
            return step
        optimizer.step(x, x)
    return limit


def test_one_step_is_the_stated_equation():
    model, (x, y) = network(), batch()
    g, hessian = gradient_and_dense_hessian(model, x, y)
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.05, lr_v=0.3, lr_negative=2.0)
    tilted = torch.linalg.eigh(hessian)[1][:, 0] + 0.1 / math.sqrt(len(g))
    v = tilted / tilted.norm()
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "extra": {**state["extra"], "v": v}})
    before = parameter_vector(model)
    loss = optimizer.step(x, y)

    with torch.no_grad():
        reference = nn.functional.cross_entropy(_at(model, before)(x), y)
    torch.testing.assert_close(loss, reference)
    assert optimizer.curvature == pytest.approx(float(v @ hessian @ v), rel=1e-10)
    assert optimizer.curvature < 0
    torch.testing.assert_close(parameter_vector(model), before - 0.05 * g - 2.0 * (g @ v) * v)
    expected = v - 0.3 * 2 * hessian @ v
    torch.testing.assert_close(optimizer.direction, expected / expected.norm())


def _at(model: nn.Module, vector: Tensor) -> nn.Module:
    other = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(vector, other.parameters())
    return other


def test_the_estimate_converges_to_the_most_negative_pair():
    model, (x, y) = network(), batch()
    _, hessian = gradient_and_dense_hessian(model, x, y)
    values, vectors = torch.linalg.eigh(hessian)
    assert values[0] < -1e-3
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.0, lr_negative=0.0)
    for _ in range(600):
        optimizer.step(x, y)
    assert optimizer.curvature == pytest.approx(float(values[0]), rel=1e-3)
    assert abs(float(optimizer.direction @ vectors[:, 0])) > 0.999


LAYERS = {
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh()],
    "weight norm by hook": lambda: [nn.utils.weight_norm(nn.Linear(5, 6), dim=None), nn.Tanh()],
    "batch norm": lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh()],
    "convolution": lambda: [nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Softplus(), nn.Flatten()],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_the_curvature_of_every_layer_is_that_of_central_differences(name):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(*LAYERS[name](), nn.Linear(6, 3)).double(), batch()
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.0, lr_negative=0.0)
    v, here = optimizer.direction.clone(), parameter_vector(model)
    optimizer.step(x, y)
    averages = [b.clone() for b in model.buffers()]

    def slope(h: float) -> Tensor:
        assign_parameters(model, here + h * v)
        loss = nn.functional.cross_entropy(model(x), y)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]) @ v

    expected = float(slope(1e-5) - slope(-1e-5)) / 2e-5
    assign_parameters(model, here)
    assert optimizer.curvature == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if name == "batch norm":  # its averages have moved once
        torch.testing.assert_close(averages[0], 0.1 * model[0](x).mean(0))


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_function_without_second_derivative_is_refused_at_every_step(place):
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers[:place], Fn(lambda s, x: OnceTanh.apply(x)), *layers[place:]).double()
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.1)
    before = parameter_vector(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"without second derivative.*replace it"):
            optimizer.step(*batch())
    assert torch.equal(parameter_vector(model), before)


def test_it_leaves_a_saddle_in_fewer_steps_than_its_base():
    for base, options in ((torch.optim.SGD, {"lr": 0.05}), (torch.optim.RMSprop, {"lr": 1e-3})):
        plain_model, ours_model = Saddle(), Saddle()
        plain = steps_to_escape(FirstOrder(plain_model, base, loss=saddle_loss, **options), plain_model)
        ours = steps_to_escape(
            NegativeCurvature(ours_model, base, loss=saddle_loss, lr_negative=1.0, **options), ours_model
        )
        assert ours < plain / 2, (base.__name__, ours, plain)


def test_without_second_update_it_is_its_base():
    ours, plain = network(), network()
    a = NegativeCurvature(ours, torch.optim.Adam, lr=0.01, lr_negative=0.0)
    b = FirstOrder(plain, torch.optim.Adam, lr=0.01)
    for seed in range(4):
        a.step(*batch(seed=seed))
        b.step(*batch(seed=seed))
    torch.testing.assert_close(parameter_vector(ours), parameter_vector(plain), rtol=1e-12, atol=1e-12)


class Strided(nn.Module):
    """Gradients in other layouts than their parameters': one number for all entries, a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.matrix = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 5).T.contiguous().T)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.shift.sum() * torch.arange(3)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_a_fused_base_takes_the_same_steps(base):
    """Fused kernels read a gradient in its parameter's layout: of one number for all they read on beyond it."""
    ends = []
    for fused in (False, True):
        model = Strided().double()
        optimizer = NegativeCurvature(model, base, lr=0.1, fused=fused)
        for _ in range(3):
            optimizer.step(*batch())
        ends.append(parameter_vector(model))
    torch.testing.assert_close(*ends)


def test_no_second_update_along_positive_curvature():
    model = nn.Linear(5, 3).double()  # convex: no negative curvature anywhere
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.0, lr_negative=5.0)
    before = parameter_vector(model)
    for _ in range(5):
        optimizer.step(*batch())
    assert optimizer.curvature >= 0
    torch.testing.assert_close(parameter_vector(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reload_continues_bit_for_bit(dtype):
    options = {"lr": 1e-3, "alpha": 0.95, "momentum": 0.22, "every": 3, "lr_negative": 0.5}
    first_model = network(dtype)
    first = NegativeCurvature(first_model, torch.optim.RMSprop, **options)
    for seed in range(5):
        first.step(*batch(dtype=dtype, seed=seed))
    saved = copy.deepcopy((first_model.state_dict(), first.state_dict()))

    second_model = network(dtype)
    second = NegativeCurvature(second_model, torch.optim.RMSprop, **{**options, "lr": 0.7, "seed": 9})
    second_model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for seed in range(5, 12):
        first.step(*batch(dtype=dtype, seed=seed))
        second.step(*batch(dtype=dtype, seed=seed))
    assert torch.equal(parameter_vector(first_model), parameter_vector(second_model))
    assert torch.equal(first.direction, second.direction)
    assert (first.curvature, first.costs.products) == (second.curvature, second.costs.products)


def test_products_and_passes_are_counted():
    optimizer = NegativeCurvature(network(), torch.optim.SGD, lr=0.01, every=4)
    for _ in range(8):
        optimizer.step(*batch())
    assert (optimizer.costs.products, optimizer.costs.forward, optimizer.costs.backward) == (2, 8, 8 + 2 * 2)


def test_schedulers_act_on_the_base():
    optimizer = NegativeCurvature(network(), torch.optim.SGD, lr=0.1, lr_negative=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.step(*batch())
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["lr_negative"] == 0.3


def test_frozen_and_unused_parameters_stay():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(5, 3), nn.Linear(2, 2), nn.Linear(5, 5)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.used(self.frozen(x)))

    model = Partial().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.1, lr_negative=0.0)
    for _ in range(3):
        optimizer.step(*batch())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"used.weight", "used.bias"}


@pytest.mark.parametrize(
    "options",
    [{"lr_v": 0.0}, {"lr_v": "fast"}, {"lr_negative": -1.0}, {"every": 0}, {"every": 1.5}, {"average": 1.0}],
)
def test_bad_hyperparameters_name_the_value(options):
    ((_, value),) = options.items()
    with pytest.raises(ValueError, match=str(value)):
        NegativeCurvature(network(), torch.optim.SGD, lr=0.1, **options)


def test_a_base_by_name():
    optimizer = NegativeCurvature(network(), "Adam", lr=0.1)
    assert isinstance(optimizer.inner, torch.optim.Adam)
    with pytest.raises(ValueError, match="Adamant"):
        NegativeCurvature(network(), "Adamant", lr=0.1)


def test_a_base_that_needs_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        NegativeCurvature(network(), torch.optim.LBFGS)


def test_one_param_group_only():
    model = network()
    with pytest.raises(ValueError, match="groups must be left out"):
        NegativeCurvature(model, torch.optim.SGD, groups=[{"params": list(model.parameters())}], lr=0.1)
    optimizer = NegativeCurvature(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="one param group"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
