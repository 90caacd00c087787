"""Levenberg–Marquardt against the formula with an explicit Jacobian, and least squares in closed form."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from curvspace.functional import flatten, parameter_vector
from curvspace.losses import get_loss
from curvspace.optim.levenberg_marquardt import LevenbergMarquardt


def network(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(5)] if batch_norm else []
    return nn.Sequential(nn.Linear(3, 5), *norm, nn.Tanh(), nn.Linear(5, 2)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1)


@pytest.mark.parametrize("scaling", ["identity", "diagonal"])
def test_proposal_solves_the_damped_system(scaling):
    model, (x, y) = network(), data()
    w = parameter_vector(model)
    names = dict(model.named_parameters())

    def outputs(v):
        parts = v.split([p.numel() for p in names.values()])
        return functional_call(model, {n: q.view_as(p) for (n, p), q in zip(names.items(), parts, strict=True)}, (x,))

    jacobian = jacrev(outputs)(w).reshape(-1, len(w))
    matrix = jacobian.T @ jacobian / len(x)
    gradient = jacobian.T @ (outputs(w) - y).detach().reshape(-1) / len(x)
    weights = torch.eye(len(w), dtype=w.dtype) if scaling == "identity" else matrix.diagonal().diag()
    expected = w - torch.linalg.solve(matrix + 0.7 * weights, gradient)
    opt = LevenbergMarquardt(model, damping=0.7, scaling=scaling)
    loss = opt.step(x, y)
    assert float(loss) == pytest.approx(float(get_loss("mse")(outputs(w), y)))
    assert opt.log() == {"damping": pytest.approx(0.07), "accepted": 1.0}
    torch.testing.assert_close(parameter_vector(model), expected, rtol=1e-8, atol=1e-10)


def test_a_linear_model_ends_at_the_least_squares_solution():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 2).double(), data()
    opt = LevenbergMarquardt(model)
    losses = [float(opt.step(x, y)) for _ in range(12)]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([model.weight.detach().T, model.bias.detach()[None]]), solution)


def test_a_worse_proposal_is_refused_and_raises_the_damping():
    model, (x, y) = network(), data()
    start = parameter_vector(model)
    opt = LevenbergMarquardt(model, lr=1e3, damping=1e-6, up=4.0)
    opt.step(x, y)
    assert opt.log() == {"damping": pytest.approx(4e-6), "accepted": 0.0}
    assert torch.equal(parameter_vector(model), start)


@pytest.mark.parametrize(("options", "bound"), [({"down": 1e-100}, 1e-12), ({"up": 1e200, "lr": 1e3}, 1e6)])
def test_the_damping_stays_within_bounds_from_which_it_comes_back(options, bound):
    model, (x, y) = network(), data()
    opt = LevenbergMarquardt(model, **options)
    opt.step(x, y)
    assert opt.damping == bound
    opt.param_groups[0].update(up=10.0, down=0.1, lr=1.0 if bound > 1 else 1e3)
    opt.step(x, y)
    assert opt.damping == pytest.approx(bound * (0.1 if bound > 1 else 10.0))
    opt.load_state_dict({**opt.state_dict(), "extra": {"damping": 0.0, "accepted": True}})
    assert opt.damping == 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_of_the_models_type(dtype):
    model, (x, y) = network().to(dtype), data()
    assert LevenbergMarquardt(model).step(x.to(dtype), y.to(dtype)).dtype == dtype


def test_running_statistics_move_once():
    model, (x, y) = network(batch_norm=True), data()
    LevenbergMarquardt(model).step(x, y)
    assert int(model[1].num_batches_tracked) == 1


def test_reload_continues_bit_for_bit():
    model, (x, y) = network(), data()
    opt = LevenbergMarquardt(model, damping=3.0)
    opt.step(x, y)
    other = copy.deepcopy(model)
    resumed = LevenbergMarquardt(other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        assert torch.equal(opt.step(x, y), resumed.step(x, y))
    assert torch.equal(flatten(model.parameters()), flatten(other.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"up": 1.0},
        {"down": 2.0},
        {"scaling": "none"},
        {"lr": -1.0},
        {"minimum": 2.0},
        {"maximum": 0.5},
    ],
)
def test_bad_hyper_parameters_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LevenbergMarquardt(network(), **options)


def test_too_large_a_model_is_refused():
    with pytest.raises(ValueError, match="5000"):
        LevenbergMarquardt(nn.Linear(100, 60))
