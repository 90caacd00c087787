"""SubspaceNewton: paper A by hand, its pieces as identities, the contract of torch's optimisers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.functional import flatten, parameter_vector, trainable_parameters
from curvspace.optim import (
    Adam,
    BottomEigenvectors,
    ClassGradients,
    DiagonalNewton,
    Drop,
    GradientDescent,
    Joint,
    PastUpdates,
    RandomDirections,
    RayleighRitzNewton,
    SaddleFree,
    Scale,
    SubspaceNewton,
    TopEigenvectors,
    bulk_sgd,
    class_gradient_newton,
    dominant_sgd,
    low_rank_newton,
    rayleigh_ritz_newton,
)

C, D = 4, 5


def linear_softmax(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(D, C).double()


def small_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def batches(count: int, n: int = 24, seed: int = 3, classes: int = C) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=g, dtype=torch.float64),
            torch.randint(0, classes, (n,), generator=g),
        )
        for _ in range(count)
    ]


def paper_a_by_hand(model, data, lr, momentum, gamma, on_step, initial, damping=0.0, floor=0.0):
    """Eq. 12, 15, 16, 17 for a linear softmax model in scalars and lists: no autograd, no code of the library."""
    w = [[*row, b] for row, b in zip(model.weight.tolist(), model.bias.tolist(), strict=True)]
    size = C * (D + 1)
    sums, seen = [[0.0] * size for _ in range(C)], [0] * C
    squares = [1.0 if initial == "weighted" else 0.0] * C
    buffer = [0.0] * size
    for x, y in data:
        rows = [[float(v) for v in r] + [1.0] for r in x]
        labels = y.tolist()
        n = len(rows)
        g = [0.0] * size
        c = [[0.0] * size for _ in range(C)]
        factor, count = [0.0] * C, [labels.count(k) for k in range(C)]
        for r, label in zip(rows, labels, strict=True):
            z = [sum(a * b for a, b in zip(wk, r, strict=True)) for wk in w]
            total = sum(math.exp(v) for v in z)
            p = [math.exp(v) / total for v in z]
            for k in range(C):
                for j in range(D + 1):
                    g[k * (D + 1) + j] += (p[k] - (k == label)) * r[j] / n
            factor[label] += p[label] * (1 - p[label]) / n
            for j in range(D + 1):  # the gradient of z_k is x in the rows of class k
                c[label][label * (D + 1) + j] += r[j] / count[label]
        step = [lr * v for v in g]
        for k in range(C):
            if count[k]:
                seen[k] += 1
                sums[k] = [gamma * s + v for s, v in zip(sums[k], c[k], strict=True)]
                curvature = factor[k] * sum(v * v for v in c[k])
                squares[k] = gamma * squares[k] + (1 - gamma) * curvature**2
            if not seen[k]:
                continue
            mean = [s * (1 - gamma) / (1 - gamma ** seen[k]) for s in sums[k]]
            length = math.sqrt(sum(v * v for v in mean))
            v = [m / length for m in mean]
            correction = 1 if initial == "weighted" else 1 - gamma ** seen[k]
            rms = max(math.sqrt(squares[k] / correction), floor) + damping
            along = sum(a * b for a, b in zip(v, g, strict=True))
            step = [s + (1 / rms - lr) * along * vi for s, vi in zip(step, v, strict=True)]
        if on_step:
            buffer = [momentum * b + s for b, s in zip(buffer, step, strict=True)]
            step = buffer
        for i, s in enumerate(step):
            w[i // (D + 1)][i % (D + 1)] -= s
    return torch.tensor([row[:D] for row in w], dtype=torch.float64), torch.tensor(
        [row[D] for row in w], dtype=torch.float64
    )


@pytest.mark.parametrize("initial", ["until seen", "weighted"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_paper_a_three_steps_equal_the_hand_computation(initial: str, momentum: float, gamma: float) -> None:
    # Class 3 comes in the third minibatch only, class 2 is absent from it.
    data = [*batches(2, classes=3), *batches(1, seed=9)]
    data[2][1][data[2][1] == 2] = 3
    assert 3 not in data[0][1]
    assert 3 in data[2][1]
    assert 2 not in data[2][1]
    model = linear_softmax()
    options = {"lr": 0.1, "momentum": momentum, "gamma": gamma}
    weight, bias = paper_a_by_hand(model, data, on_step=momentum > 0, initial=initial, **options)
    optimizer = class_gradient_newton(model, num_classes=C, initial=initial, **options)
    for x, y in data:
        optimizer.step(x, y)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=0, atol=1e-10)


def test_damping_and_floor_enter_as_documented() -> None:
    data, model = batches(3), linear_softmax()
    weight, _ = paper_a_by_hand(model, data, 0.1, 0.0, 0.9, False, "until seen", damping=0.3, floor=0.2)
    optimizer = class_gradient_newton(model, num_classes=C, lr=0.1, momentum=0.0, damping=0.3, floor=0.2)
    for x, y in data:
        optimizer.step(x, y)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=1e-10)


def test_absent_class_moves_neither_average_nor_counter() -> None:
    (x, y), model = batches(1)[0], linear_softmax()
    basis, inside = ClassGradients(0.9), DiagonalNewton(0.9)
    optimizer = SubspaceNewton(model, basis, inside, GradientDescent(0.1))
    optimizer.step(x, y)
    before = copy.deepcopy((basis.state, inside.state))
    keep = y != 1
    optimizer.step(x[keep], y[keep])
    for old, new in zip(before, (basis.state, inside.state), strict=True):
        for key in old:
            assert torch.equal(old[key][1], new[key][1])
            assert not torch.equal(old[key][0], new[key][0])


def test_averages_of_eq_16_are_bias_corrected() -> None:
    (x, y), model = batches(1)[0], linear_softmax()
    basis = ClassGradients(0.9)
    SubspaceNewton(model, basis, Drop(), GradientDescent(0.0)).step(x, y)
    expected = torch.stack([x[y == k].mean(0) for k in range(C)])
    found = basis.averages()[:, : C * D].view(C, C, D)
    torch.testing.assert_close(torch.stack([found[k, k] for k in range(C)]), expected)


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
        # PastUpdates has no direction at its first refresh, and never another refresh: all is co-space.
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
    assert ours.costs.steps == 3
    assert ours.costs.forward == pytest.approx(3 + 0.25)
    assert ours.costs.backward == pytest.approx(4 + 0.25)
    assert ours.costs.jvp == ours.costs.products == pytest.approx(0.25 * C)
    assert ours.costs.seconds > 0


def test_batch_norm_exact_and_frozen() -> None:
    """Exact class gradients pass through the batch statistics, frozen ones do not; either way the running
    statistics move once a step, as in plain training."""
    x, y = batches(1)[0]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, C)).double()

    plain = network()
    plain(x)
    rows = {}
    for method in ("auto", "frozen"):
        model = network()
        basis = ClassGradients(0.0, num_classes=C, method=method)
        SubspaceNewton(model, basis, Scale(), GradientDescent(0.0)).step(x, y)
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
        assert int(model[1].num_batches_tracked) == 1
        rows[method] = basis.averages()
    model = network()
    z = model(x)
    for k in range(C):
        expected = flatten(torch.autograd.grad(z[y == k, k].mean(), list(model.parameters()), retain_graph=True))
        torch.testing.assert_close(rows["auto"][k], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(rows["auto"], rows["frozen"])


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
