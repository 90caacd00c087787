"""FOSI, Nudged-SGD, BSFA and gradient centralisation against dense computations of their iterates in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from curvspace.functional import assign_parameters, parameter_vector
from curvspace.losses import get_loss
from curvspace.optim import bsfa, build, fosi, gradient_centralisation, nudged_sgd
from curvspace.optim.kfac import KFAC, _OwnLabels
from tests.unit.oracles import dense_hessian, flat_gradient, mean_loss, trainable
from tests.unit.small_networks import C, batches, small_network

EXACT = {"tol": 1e-10, "max_products": 4000}


class Quadratic(nn.Module):
    r""":math:`\frac12 (\theta - \theta_*)^\top A (\theta - \theta_*)` at inputs that do not matter."""

    def __init__(self, A: Tensor, minimum: Tensor):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(minimum))
        self.register_buffer("A", A)
        self.register_buffer("minimum", minimum)

    def forward(self, x: Tensor) -> Tensor:
        d = self.theta - self.minimum
        return (0.5 * d @ self.A @ d).expand(len(x), 1)


def quadratic() -> Quadratic:
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    values = torch.tensor([9.0, 7, 5, 2, 1.5, 1, 0.8, 0.5, 0.3, 0.2, -0.4, -0.9], dtype=torch.float64)
    return Quadratic(Q @ torch.diag(values) @ Q.T, torch.randn(12, dtype=torch.float64))


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


def fosi_by_hand(
    point: Tensor, gradients, hessians, steps: int, *, k, low, lr, mu, alpha, every, warmup, clip, adam=False
) -> list[Tensor]:
    """The authors' algorithm with dense matrices: explicit V, projections by V V', its own heavy ball or Adam."""
    n = len(point)
    V, inverse, factor = torch.zeros(n, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 1.0
    velocity, buffer, second, path = torch.zeros(n).double(), torch.zeros(n).double(), torch.zeros(n).double(), []
    for t in range(steps):
        g = gradients(point, t)
        if t + 1 >= warmup and (t + 1 - warmup) % every == 0:
            values, vectors = torch.linalg.eigh(hessians(point, t))
            chosen = [*range(low), *range(n - k, n)]
            V, inverse = vectors[:, chosen], 1 / values[chosen].abs()
            factor = min(max(float(values[-1].abs() / values[n - k].abs()), 1.0), clip)
        P = V @ V.T
        g1 = P @ g
        g2 = g - g1
        velocity = mu * velocity + (1 - mu if adam else 1) * g1
        newton = V @ (inverse * (V.T @ velocity))
        if adam:
            buffer, second = mu * buffer + (1 - mu) * g2, 0.999 * second + 0.001 * g2**2
            base = lr * (buffer / (1 - mu ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        else:
            buffer = mu * buffer + g2
            base = lr * buffer
        point = point - alpha * newton - factor * (base - P @ base)
        path.append(point)
    return path


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("ends", [(3, 0), (2, 2)])
def test_fosi_on_a_quadratic_takes_the_steps_of_the_dense_algorithm(ends: tuple[int, int], adam: bool) -> None:
    model, (k, low) = quadratic(), ends
    A, minimum = model.A, model.minimum
    rule = {"lr": 0.02, "alpha": 0.3, "refresh_every": 4, "warmup": 3}
    optimizer = fosi(
        model, k, smallest=low, momentum=0.8, loss=mean_output, cospace="adam" if adam else "sgd", **rule, **EXACT
    )
    expected = fosi_by_hand(
        torch.zeros(12, dtype=torch.float64), lambda p, t: A @ (p - minimum), lambda p, t: A, 15,
        k=k, low=low, lr=0.02, mu=0.8, alpha=0.3, every=4, warmup=3, clip=1.0 if adam else 3.0, adam=adam,
    )  # fmt: skip
    for point in expected:
        optimizer.step(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2))
        torch.testing.assert_close(parameter_vector(model), point, rtol=0, atol=1e-8)


def test_fosi_on_a_network_takes_the_steps_of_the_dense_algorithm() -> None:
    """The eigenvectors turn from refresh to refresh here, so momentum must survive the change of the span."""
    model, twin, data = small_network(), small_network(), batches(12)
    rule = {"lr": 0.05, "alpha": 0.1, "refresh_every": 3, "warmup": 2}
    optimizer = fosi(model, 3, smallest=1, momentum=0.9, **rule, **EXACT)

    def gradient(point: Tensor, t: int) -> Tensor:
        assign_parameters(twin, point)
        x, y = data[t]
        return flat_gradient(mean_loss(twin(x), y, "cross_entropy"), trainable(twin)).detach()

    def hessian(point: Tensor, t: int) -> Tensor:
        assign_parameters(twin, point)
        return dense_hessian(twin, [data[t]], "cross_entropy").detach()

    expected = fosi_by_hand(
        parameter_vector(twin), gradient, hessian, 12,
        k=3, low=1, lr=0.05, mu=0.9, alpha=0.1, every=3, warmup=2, clip=3.0,
    )  # fmt: skip
    for (x, y), point in zip(data, expected, strict=True):
        optimizer.step(x, y)
        torch.testing.assert_close(parameter_vector(model), point, rtol=0, atol=1e-7)


def test_nudged_sgd_has_a_smaller_rate_along_the_top_eigenvectors() -> None:
    model, twin = small_network(), small_network()
    optimizer = nudged_sgd(model, 2, lr=0.3, factor=0.1, refresh_every=1, **EXACT)
    for x, y in batches(3):
        g = flat_gradient(mean_loss(twin(x), y, "cross_entropy"), trainable(twin)).detach()
        _, vectors = torch.linalg.eigh(dense_hessian(twin, [(x, y)], "cross_entropy").detach())
        P = vectors[:, -2:] @ vectors[:, -2:].T
        optimizer.step(x, y)
        assign_parameters(twin, parameter_vector(twin) - 0.3 * (g - P @ g) - 0.03 * P @ g)
        torch.testing.assert_close(parameter_vector(model), parameter_vector(twin), rtol=0, atol=1e-8)


@pytest.mark.parametrize("centred", [True, False])
def test_bsfa_amplifies_what_is_not_among_the_principal_directions_of_the_base_steps(centred: bool) -> None:
    model, twin, data = small_network(), small_network(), batches(11)
    options = {"dominant": 0.5, "bulk": 3.0, "window": 6, "refresh_every": 4}
    optimizer = bsfa(model, 2, lr=0.02, momentum=0.9, centred=centred, **options)
    buffer, past, P = 0.0, [], torch.zeros(len(parameter_vector(twin)), dtype=torch.float64).diag()
    projecting = False
    for t, (x, y) in enumerate(data):
        g = flat_gradient(mean_loss(twin(x), y, "cross_entropy"), trainable(twin)).detach()
        if t % 4 == 0 and len(past) > 2:
            U = torch.stack(past[-6:])
            U = U - U.mean(0) if centred else U
            V = torch.linalg.svd(U, full_matrices=False).Vh[:2].T
            P, projecting = V @ V.T, True
        buffer = 0.9 * buffer + g
        v = 0.02 * buffer
        past.append(v)
        optimizer.step(x, y)
        step = 0.5 * P @ v + 3.0 * (v - P @ v) if projecting else v
        assign_parameters(twin, parameter_vector(twin) - step)
        torch.testing.assert_close(parameter_vector(model), parameter_vector(twin), rtol=0, atol=1e-9)
    assert projecting


@pytest.mark.parametrize("cospace", ["sgd", "adam"])
def test_gradient_centralisation_is_the_base_rule_on_centred_gradients(cospace: str) -> None:
    model, twin = small_network(), small_network()
    optimizer = gradient_centralisation(model, lr=0.05, momentum=0.9, cospace=cospace)
    if cospace == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    else:
        base = torch.optim.Adam(twin.parameters(), lr=0.05)
    for x, y in batches(5):
        base.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        for p in twin.parameters():
            if p.ndim > 1:
                p.grad -= p.grad.flatten(1).mean(1)[(...,) + (None,) * (p.ndim - 1)]
        base.step()
        optimizer.step(x, y)
        torch.testing.assert_close(parameter_vector(model), parameter_vector(twin), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["fosi", "nudged-sgd", "bsfa", "gradient-centralisation"])
def test_a_reload_continues_bit_for_bit(kind: str) -> None:
    options = {"fosi": {"k": 2, "refresh_every": 3, "smallest": 1}, "bsfa": {"k": 2, "window": 4, "refresh_every": 3}}
    model, data = small_network(), batches(9)
    optimizer = build(kind, options.get(kind, {}), model, C, lr=0.05)
    for x, y in data[:5]:
        optimizer.step(x, y)
    other = copy.deepcopy(model)
    resumed = build(kind, options.get(kind, {}), other, C, lr=0.05)
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in data[5:]:
        optimizer.step(x, y)
        resumed.step(x, y)
        assert torch.equal(parameter_vector(model), parameter_vector(other))


def test_newton_steps_follow_the_schedule_of_the_rate() -> None:
    """At half the rate that a schedule started from, the whole step is half as long."""
    steps = []
    for factor in (1.0, 0.5):
        model = small_network()
        optimizer = build("rayleigh-ritz-newton", {"momentum": 0.0}, model, C, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, f=factor: f)
        start = parameter_vector(model)
        optimizer.step(*batches(1)[0])
        schedule.step()
        steps.append(parameter_vector(model) - start)
    torch.testing.assert_close(steps[1], 0.5 * steps[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fosi(m, 0), "k must be at least 1"),
        (lambda m: fosi(m, 2, smallest=-1), "smallest must be at least 0"),
        (lambda m: fosi(m, 2, clip=0.5), "clip must be at least 1"),
        (lambda m: fosi(m, 2, warmup=0), "warmup must be at least 1"),
        (lambda m: fosi(m, 2, momentum=1.0), "momentum must be in"),
        (lambda m: nudged_sgd(m, 2, factor=-0.1), "relative must be at least 0"),
        (lambda m: bsfa(m, 5, window=5), "window must be more than k = 5"),
        (lambda m: bsfa(m, 5, bulk=-1.0), "outside must be at least 0"),
    ],
)
def test_bad_values_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(small_network())


_W3 = torch.tensor([0.5, 2.0, 3.0]).double()
CROSS_ENTROPIES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(_W3),
    "weights, sum": nn.CrossEntropyLoss(_W3, reduction="sum"),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "weights, smoothing": nn.CrossEntropyLoss(_W3, label_smoothing=0.2),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
}


@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_kfac_draws_labels_whose_gradients_have_the_losses_hessian_for_second_moments(name, positions):
    module = CROSS_ENTROPIES[name]
    torch.manual_seed(0)
    z, y = torch.randn(4, 3, *positions).double(), torch.randint(3, (4, *positions))
    rows = z.movedim(1, -1).reshape(-1, 3)
    own = _OwnLabels(get_loss(module).position_weights(z, y))
    moments = torch.zeros(len(rows), 3, 3).double()
    for label in range(3):
        leaf = rows.clone().requires_grad_()
        (g,) = torch.autograd.grad(own(leaf, torch.full((len(rows),), label)), leaf)
        moments += rows.softmax(1)[:, label, None, None] * g[:, :, None] * g[:, None, :]

    def of_rows(r: Tensor) -> Tensor:
        return module(r.view(4, *positions, 3).movedim(-1, 1), y)

    whole = torch.autograd.functional.hessian(of_rows, rows)
    torch.testing.assert_close(moments, torch.stack([whole[i, :, i] for i in range(len(rows))]))


@pytest.mark.peers
@pytest.mark.parametrize("factor", [2.0, 12.0])
@pytest.mark.parametrize("refresh_every", [1, 2])
def test_kfac_takes_the_same_step_on_a_multiple_of_the_loss(refresh_every, factor):
    """Of a natural gradient the loss's scale drops out, if the damping has it too."""
    pytest.importorskip("curvlinops")
    weight = torch.full((C,), factor / 12).double()
    losses = (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight, reduction="sum"), nn.CrossEntropyLoss(weight))
    points = []
    for loss, scale in zip(losses, (1.0, factor, 1.0), strict=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)).double()
        optimizer = KFAC(model, loss, lr=0.1, damping=1e-3 * scale, refresh_every=refresh_every)
        for _ in range(3):
            optimizer.step(torch.randn(12, 5).double(), torch.randint(C, (12,)))
        points.append(parameter_vector(model))
    torch.testing.assert_close(points[1], points[0])
    torch.testing.assert_close(points[2], points[0])
