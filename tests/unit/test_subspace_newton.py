"""SubspaceNewton: its pieces as identities and against dense solves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.functional import flatten, parameter_vector, trainable_parameters
from curvspace.losses import get_loss
from curvspace.optim import (
    Adam,
    BottomEigenvectors,
    ClassGradients,
    DiagonalNewton,
    Drop,
    GradientDescent,
    Joint,
    MomentumNewton,
    PastUpdates,
    RandomDirections,
    RayleighRitzNewton,
    SaddleFree,
    Scale,
    SubspaceNewton,
    TopEigenvectors,
    bulk_sgd,
    dominant_sgd,
    low_rank_newton,
    rayleigh_ritz_newton,
)
from curvspace.optim.base import Costs
from curvspace.optim.minibatch import Minibatch
from tests.unit.small_networks import C, D, batches, linear_softmax, small_network

BASES = {
    "class gradients": lambda: ClassGradients(0.9, orthonormal=True),
    "top": lambda: TopEigenvectors(3),
    "bottom": lambda: BottomEigenvectors(2),
    "random": lambda: RandomDirections(3, redraw=True),
    "joint": lambda: Joint([ClassGradients(0.5, orthonormal=True), PastUpdates(2)]),
}


@pytest.mark.parametrize("name", BASES)
def test_scale_on_both_sides_is_gradient_descent(name: str) -> None:
    """With the same multiple inside and outside, the split must cancel, whatever the (orthonormal) basis."""
    split, plain = small_network(), small_network()
    optimizer = SubspaceNewton(split, BASES[name](), Scale(), GradientDescent(0.2))
    reference = torch.optim.SGD(plain.parameters(), lr=0.2)
    for x, y in batches(4):
        reference.zero_grad()
        expected = nn.functional.cross_entropy(plain(x), y)
        expected.backward()
        reference.step()
        torch.testing.assert_close(optimizer.step(x, y), expected.detach())
    torch.testing.assert_close(parameter_vector(split), parameter_vector(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_orthonormal_bases_are_orthonormal(name: str) -> None:
    optimizer = SubspaceNewton(small_network(), BASES[name](), Scale(), GradientDescent(0.1))
    for x, y in batches(3):
        optimizer.step(x, y)
    Q = optimizer.basis.span.matrix()
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), rtol=0, atol=1e-8)


def test_momentum_without_span_is_torch_sgd_and_adam() -> None:
    for outside, kind, options in [
        (GradientDescent(0.1, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (Adam(0.01), torch.optim.Adam, {"lr": 0.01}),
    ]:
        ours, plain = small_network(), small_network()
        reference = kind(plain.parameters(), **options)
        # PastUpdates has no direction at its first refresh, and never another refresh: all is orthogonal complement.
        optimizer = SubspaceNewton(ours, PastUpdates(1), Drop(), outside, refresh_every=1000)
        for x, y in batches(5):
            reference.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            reference.step()
            optimizer.step(x, y)
        torch.testing.assert_close(parameter_vector(ours), parameter_vector(plain), rtol=0, atol=1e-12)


def dense_gauss_newton(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J^T H J / N from one backward pass per output."""
    parameters = list(trainable_parameters(model).values())
    z = model(x)
    J = torch.stack(
        [flatten(torch.autograd.grad(z[i, k], parameters, retain_graph=True)) for i in range(len(x)) for k in range(C)]
    )
    p = z.detach().softmax(1)
    total = torch.zeros(J.shape[1], J.shape[1], dtype=torch.float64)
    for i in range(len(x)):
        block = J[i * C : (i + 1) * C]
        total += block.T @ (torch.diag(p[i]) - torch.outer(p[i], p[i])) @ block / len(x)
    return total


def dense_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Double backward, row by row."""
    parameters = list(trainable_parameters(model).values())
    g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters, create_graph=True))
    return torch.stack([flatten(torch.autograd.grad(v, parameters, retain_graph=True)) for v in g])


@pytest.mark.parametrize("rule", ["gauss-newton", "hessian", "saddle-free"])
def test_newton_step_in_the_span_equals_the_dense_solve(rule: str) -> None:
    model, (x, y) = small_network(), batches(1)[0]
    inside = (
        SaddleFree(0.1, 0.5) if rule == "saddle-free" else RayleighRitzNewton(0.1, 0.5, curvature=rule)  # type: ignore[arg-type]
    )
    A = dense_gauss_newton(model, x) if rule == "gauss-newton" else dense_hessian(model, x, y)
    g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
    start = parameter_vector(model)
    optimizer = SubspaceNewton(model, RandomDirections(4), inside, Drop())
    optimizer.step(x, y)
    Q = optimizer.basis.span.matrix()
    small = Q.T @ A @ Q
    if rule == "saddle-free":
        values, vectors = torch.linalg.eigh(small)
        small = vectors @ torch.diag(values.abs()) @ vectors.T
    expected = 0.5 * Q @ torch.linalg.solve(small + 0.1 * torch.eye(4, dtype=torch.float64), Q.T @ g)
    torch.testing.assert_close(start - parameter_vector(model), expected, rtol=0, atol=1e-10)


def test_rayleigh_ritz_solves_a_quadratic_in_one_step_within_the_span() -> None:
    """Half squared error of a linear model: the full step minimises the loss over the span."""
    torch.manual_seed(1)
    model = nn.Linear(D, 3).double()
    x, t = torch.randn(40, D, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    optimizer = SubspaceNewton(model, RandomDirections(5), RayleighRitzNewton(0.0), Drop(), loss="mse")
    optimizer.step(x, t)
    Q = optimizer.basis.span.matrix()
    g = Objective(model, [(x, t)], loss="mse").gradient()
    torch.testing.assert_close(Q.T @ g, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_low_rank_newton_is_paper_b_eq_11() -> None:
    model, (x, y) = small_network(), batches(1)[0]
    values, vectors = torch.linalg.eigh(dense_hessian(model, x, y))
    g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
    start = parameter_vector(model)
    low_rank_newton(model, k=3, cospace=False, tol=1e-10, max_products=200).step(x, y)
    top, V = values[-3:], vectors[:, -3:]
    expected = V @ ((V.T @ g) / top)
    torch.testing.assert_close(start - parameter_vector(model), expected, rtol=0, atol=1e-8)


def test_dominant_and_bulk_steps_add_up_to_sgd() -> None:
    x, y = batches(1)[0]
    moves = []
    for build in (dominant_sgd, bulk_sgd):
        model = small_network()
        start = parameter_vector(model)
        build(model, k=2, lr=0.3, tol=1e-9, max_products=200).step(x, y)
        moves.append(start - parameter_vector(model))
    model = small_network()
    g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
    torch.testing.assert_close(moves[0] + moves[1], 0.3 * g, rtol=0, atol=1e-8)
    assert abs(float(moves[0] @ moves[1])) < 1e-8


def test_bulk_outside_the_class_gradients() -> None:
    x, y = batches(1)[0]
    model = small_network()
    start = parameter_vector(model)
    rows, _ = class_gradients(model, x, y, num_classes=C)
    g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
    bulk_sgd(model, k=C, lr=0.3, span="class-gradients").step(x, y)
    q, _ = torch.linalg.qr(rows.T)
    torch.testing.assert_close(start - parameter_vector(model), 0.3 * (g - q @ (q.T @ g)), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="span must be"):
        bulk_sgd(model, k=C, span="classes")


def test_trust_radius_bounds_the_step() -> None:
    model, (x, y) = linear_softmax(), batches(1)[0]
    start = parameter_vector(model)
    optimizer = SubspaceNewton(model, ClassGradients(0.9), DiagonalNewton(trust_radius=0.01), Drop())
    optimizer.step(x, y)
    torch.testing.assert_close((start - parameter_vector(model)).norm().item(), 0.01, rtol=1e-9, atol=0)


def test_adaptive_damping_falls_on_an_exact_model_and_rises_on_a_bad_one() -> None:
    torch.manual_seed(1)
    x, t = torch.randn(40, D, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    exact = rayleigh_ritz_newton(nn.Linear(D, 3).double(), num_classes=3, damping="adaptive", fraction=1.0, loss="mse")
    exact.basis = RandomDirections(5)  # regression has no classes
    for _ in range(10):
        exact.step(x, t)
    assert float(exact.log()["damping"]) < 0.1
    assert float(exact.log()["reduction_ratio"]) == pytest.approx(1.0, abs=1e-6)
    model = small_network()
    bad = rayleigh_ritz_newton(model, num_classes=C, damping="adaptive", scale=200.0, fraction=1.0)
    for x, y in batches(10):
        bad.step(x, y)
    assert float(bad.log()["damping"]) > 0.1


def test_adaptive_damping_leaves_the_step_itself_alone() -> None:
    """The test evaluates the loss half-way; the step must end where it would have ended."""
    data = batches(4)
    ends = []
    for every in (1, 1000):
        model = small_network()
        optimizer = rayleigh_ritz_newton(model, num_classes=C, damping="adaptive")
        rule = optimizer.inside.damping
        rule.every, rule.factor = every, 1 - 1e-15
        for x, y in data:
            optimizer.step(x, y)
        ends.append(parameter_vector(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


@pytest.mark.parametrize("late", [False, True])
def test_the_mean_curvature_of_an_unchanged_network_is_its_curvature(late: bool) -> None:
    """The class gradients' averages grow from zero, and a class may come late: neither is a change of curvature."""
    model, (x, y) = small_network(), batches(1)[0]
    basis, averaged, alone = ClassGradients(0.9, True, C), RayleighRitzNewton(gamma=0.9), RayleighRitzNewton()
    whole = Minibatch(model, get_loss("cross_entropy"), x, y, Costs())
    for seen in [y < C - late, y < C, y < C]:
        basis.observe(Minibatch(model, whole.loss, x[seen], y[seen], Costs()), refresh=True)
        averaged.refresh(basis.span, whole, None)
    alone.refresh(basis.span, whole, None)
    torch.testing.assert_close(averaged.state["values"], alone.state["values"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["qr", "symmetric"])
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_momentum_in_a_span_that_moves_in_place_is_that_of_the_whole_space(form: str, refresh_every: int) -> None:
    model = small_network()
    optimizer = SubspaceNewton(
        model, ClassGradients(0.9, form, C), MomentumNewton(0.02, 0.8), Drop(), refresh_every=refresh_every
    )
    momentum, before = torch.zeros(()), parameter_vector(model)
    for x, y in batches(7):
        g = flatten(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))
        optimizer.step(x, y)
        Q = optimizer.basis.span.matrix()
        momentum = 0.8 * momentum + Q @ Q.T @ g
        before -= 0.02 * Q @ (Q.T @ momentum / optimizer.inside.curvatures())
        torch.testing.assert_close(parameter_vector(model), before, rtol=0, atol=1e-12)


def test_momentum_in_a_span_needs_an_orthonormal_basis() -> None:
    optimizer = SubspaceNewton(small_network(), ClassGradients(num_classes=C), MomentumNewton(), Drop())
    with pytest.raises(ValueError, match="MomentumNewton needs an orthonormal basis"):
        optimizer.step(*batches(1)[0])


def test_a_mean_curvature_of_directions_that_come_and_go_is_refused() -> None:
    optimizer = rayleigh_ritz_newton(small_network(), C, past_updates=2, curvature_gamma=0.5, refresh_every=1)
    data = batches(2)
    optimizer.step(*data[0])
    with pytest.raises(ValueError, match="the basis has 6 directions, before it had 4"):
        optimizer.step(*data[1])


@pytest.mark.parametrize("without", ["ignored labels", "weight 0"])
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_curvature_is_not_measured_where_no_example_of_the_share_counts(curvature: str, without: str) -> None:
    """A mean over nothing has no curvature: it would be the longest step that the damping allows."""
    x, y = batches(1, n=16)[0]
    y = torch.where(torch.arange(16) < 4, C - 1, y % (C - 1))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    if without == "ignored labels":
        y, loss = torch.where(y == C - 1, -100, y), nn.CrossEntropyLoss()
    steps = []
    for fraction in (0.25, 1.0):
        model = small_network()
        rule = RayleighRitzNewton(0.1, curvature=curvature, fraction=fraction)
        SubspaceNewton(model, RandomDirections(3), rule, GradientDescent(0.1), loss).step(x, y)
        steps.append(parameter_vector(model))
    assert torch.equal(*steps)
