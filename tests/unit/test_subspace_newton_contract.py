"""SubspaceNewton keeps the contract of torch's optimisers: reloads, schedulers, costs, bad values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_networks import C, D, batches, linear_softmax, small_network
from torch import nn

from curvspace.functional import flatten, parameter_vector
from curvspace.optim import (
    Adam,
    ClassGradients,
    DiagonalNewton,
    Drop,
    GradientDescent,
    PastUpdates,
    RandomDirections,
    Scale,
    SubspaceNewton,
    bulk_sgd,
    class_gradient_newton,
    dominant_sgd,
    low_rank_newton,
    rayleigh_ritz_newton,
)

CONFIGURATIONS = {
    "paper A": lambda m: class_gradient_newton(m, C, damping=0.1),
    "ours": lambda m: rayleigh_ritz_newton(m, C, refresh_every=2, curvature_gamma=0.5),
    "adaptive": lambda m: rayleigh_ritz_newton(m, C, damping="adaptive", past_updates=2, cospace="adam", lr=0.01),
    "past updates, every step": lambda m: rayleigh_ritz_newton(m, C, past_updates=2, refresh_every=1),
    "class gradients dropped": lambda m: bulk_sgd(m, C, momentum=0.9, span="class-gradients", refresh_every=3),
    "low rank": lambda m: low_rank_newton(m, C, refresh_every=2, damping=0.1),
    "dominant": lambda m: dominant_sgd(m, C, momentum=0.5, refresh_every=3),
    "random": lambda m: SubspaceNewton(m, RandomDirections(3, redraw=True), Scale(0.1), GradientDescent(0.1, 0.5)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reload_continues_bit_for_bit(name: str, tmp_path) -> None:
    data = [(x.float(), y) for x, y in batches(9)]
    model = small_network(dtype=torch.float32)
    optimizer = CONFIGURATIONS[name](model)
    for x, y in data[:5]:
        optimizer.step(x, y)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for x, y in data[5:]:
        optimizer.step(x, y)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = small_network(seed=7, dtype=torch.float32)
    again = CONFIGURATIONS[name](other)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for x, y in data[5:]:
        again.step(x, y)
    assert torch.equal(parameter_vector(model), parameter_vector(other))
    assert again.costs.products == optimizer.costs.products


def test_state_dict_is_a_snapshot() -> None:
    optimizer = class_gradient_newton(small_network(), C, damping=0.1)
    first, second = batches(2)
    optimizer.step(*first)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["extra"])
    optimizer.step(*second)
    assert torch.equal(saved["extra"]["basis"]["average"], kept["basis"]["average"])
    assert torch.equal(saved["extra"]["buffer"], kept["buffer"])


def test_learning_rate_scheduler_acts_on_the_cospace() -> None:
    x, y = batches(1)[0]
    model = small_network()
    optimizer = SubspaceNewton(model, RandomDirections(2), Drop(), GradientDescent(0.4))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    lengths = []
    for _ in range(2):
        before = parameter_vector(model)
        g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
        optimizer.step(x, y)
        scheduler.step()
        rest = optimizer.basis.span.reject(g)
        lengths.append(float((before - parameter_vector(model)).norm() / rest.norm()))
    assert lengths == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda m: class_gradient_newton(m, C, lr=-1.0), "lr.*-1.0"),
        (lambda m: class_gradient_newton(m, C, momentum=1.5), "momentum.*1.5"),
        (lambda m: class_gradient_newton(m, C, gamma=1.0), "gamma.*1.0"),
        (lambda m: class_gradient_newton(m, C, damping=-0.5), "damping.*-0.5"),
        (lambda m: class_gradient_newton(m, C, momentum_on="both"), "momentum_on.*both"),
        (lambda m: class_gradient_newton(m, C, initial="one"), "initial.*one"),
        (lambda m: class_gradient_newton(m, 0), "num_classes.*0"),
        (lambda m: rayleigh_ritz_newton(m, C, damping="fixed"), "damping.*fixed"),
        (lambda m: rayleigh_ritz_newton(m, C, scale=0.0), "scale.*0.0"),
        (lambda m: rayleigh_ritz_newton(m, C, fraction=2.0), "fraction.*2.0"),
        (lambda m: rayleigh_ritz_newton(m, C, refresh_every=0), "refresh_every.*0"),
        (lambda m: rayleigh_ritz_newton(m, C, cospace="adam", momentum_on="step"), "momentum_on"),
        (lambda m: low_rank_newton(m, 0), "k.*0"),
        (lambda m: low_rank_newton(m, 3, curvature="fisher"), "curvature.*fisher"),
        (lambda m: SubspaceNewton(m, PastUpdates(0), Drop(), Drop()), "k.*0"),
        (lambda m: SubspaceNewton(m, RandomDirections(2), Drop(), Adam(0.1, eps=0.0)), "eps.*0.0"),
    ],
)
def test_bad_values_are_named(build, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(linear_softmax())


def test_diagonal_newton_refuses_a_basis_without_estimates() -> None:
    optimizer = SubspaceNewton(linear_softmax(), RandomDirections(2), DiagonalNewton(), GradientDescent(0.1))
    with pytest.raises(ValueError, match="RayleighRitzNewton"):
        optimizer.step(*batches(1)[0])


def test_one_param_group_only() -> None:
    optimizer = class_gradient_newton(linear_softmax(), C)
    with pytest.raises(ValueError, match="one param group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_costs_are_counted() -> None:
    x, y = batches(1)[0]
    paper = class_gradient_newton(small_network(), C)
    paper.step(x, y)
    assert (paper.costs.forward, paper.costs.backward, paper.costs.products) == (1, 2, 0)
    ours = rayleigh_ritz_newton(small_network(), C, refresh_every=3, fraction=0.25)
    for _ in range(3):
        ours.step(x, y)
    assert ours.steps == 3
    assert ours.costs.forward == pytest.approx(3 + 0.25)
    assert ours.costs.backward == pytest.approx(4 + 0.25)
    assert ours.costs.jvp == ours.costs.products == pytest.approx(0.25 * C)
    assert ours.costs.seconds > 0


def test_batch_norm_by_batch_and_running_statistics() -> None:
    """Class gradients pass through the statistics that are asked for; either way the running
    statistics move once a step, as in plain training."""
    x, y = batches(1)[0]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, C)).double()

    plain = network()
    plain(x)
    rows = {}
    for batch_norm in (None, "running"):
        model = network()
        basis = ClassGradients(0.0, num_classes=C, batch_norm=batch_norm)
        SubspaceNewton(model, basis, Scale(), GradientDescent(0.0)).step(x, y)
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
        assert int(model[1].num_batches_tracked) == 1
        rows[batch_norm] = basis.averages()
    model = network()
    z = model(x)
    for k in range(C):
        expected = flatten(torch.autograd.grad(z[y == k, k].mean(), list(model.parameters()), retain_graph=True))
        torch.testing.assert_close(rows[None][k], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(rows[None], rows["running"])


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_inputs_as_tuple_or_mapping(form: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear_softmax()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner(a + b)

    x, y = batches(1)[0]
    model, plain = Two(), linear_softmax()
    inputs = (x / 2, x / 2) if form == "tuple" else {"a": x / 2, "b": x / 2}
    loss = rayleigh_ritz_newton(model, C).step(inputs, y)
    torch.testing.assert_close(loss, rayleigh_ritz_newton(plain, C).step(x, y))
    torch.testing.assert_close(parameter_vector(model), parameter_vector(plain))


def test_a_diverged_run_gives_nan_and_no_crash() -> None:
    x, y = batches(1)[0]
    for name, build in CONFIGURATIONS.items():
        model = small_network()
        optimizer = build(model)
        optimizer.step(x, y)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        for _ in range(3):
            assert math.isnan(optimizer.step(x, y)), name
