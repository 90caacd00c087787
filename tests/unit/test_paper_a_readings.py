"""Paper A as it can be read: each reading's first three steps against numpy by hand, on a network with a hidden layer,
whose class gradients are far from orthogonal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvspace.functional import parameter_vector
from curvspace.optim import ClassGradients, DiagonalNewton, GradientDescent, SubspaceNewton, class_gradient_newton
from curvspace.optim.span import ordered_span, sequential_span, symmetric_span

C, D, H = 3, 4, 5
GAMMA = 0.9


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, H, bias=False), nn.Tanh(), nn.Linear(H, C, bias=False)).double()


def minibatches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three of 12 examples; class 2 comes in the second and third only, class 0 is absent from the third."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for labels in ([0, 1], [0, 1, 2], [1, 2]):
        x = torch.randn(12, D, generator=generator, dtype=torch.float64) + 0.5
        found.append((x, torch.tensor((labels * 12)[:12])))
    return found


def measure(w: np.ndarray, u: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient (P,), the examples' gradients of their own class's logit (N, P), their p_y (N,): eq. 5 and 8."""
    h = np.tanh(x @ w.T)
    e = np.exp(h @ u.T)
    p = e / e.sum(1, keepdims=True)
    own, gradient = [], np.zeros(w.size + u.size)
    for i in range(len(x)):
        for k in range(C):
            du = np.zeros_like(u)
            du[k] = h[i]
            dz = np.concatenate([np.outer(u[k] * (1 - h[i] ** 2), x[i]).ravel(), du.ravel()])
            gradient += (p[i, k] - (k == y[i])) * dz / len(x)
            if k == y[i]:
                own.append(dz)
    return gradient, np.array(own), p[np.arange(len(x)), y]


def split(vectors: np.ndarray, g: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions (k, P), coordinates (k,) and what is left of g (P,)."""
    if how == "sequential":
        rest, coordinates = g.copy(), []
        for v in vectors:
            coordinates.append(v @ rest)
            rest = rest - coordinates[-1] * v
        return vectors, np.array(coordinates), rest
    if how == "qr":
        q, r = np.linalg.qr(vectors.T)
        vectors = (q * np.sign(np.diag(r))).T
    if how == "symmetric":  # the polar factor
        left, _, right = np.linalg.svd(vectors, full_matrices=False)
        vectors = left @ right
    return vectors, vectors @ g, g - vectors.T @ (vectors @ g)


def by_hand(lr: float, momentum: float, dampening: float, how: str, initial: str, reduction: str, scale: float | str):
    model = network()
    w, u = model[0].weight.detach().numpy().copy(), model[2].weight.detach().numpy().copy()
    average, squares, times = np.zeros((C, w.size + u.size)), np.full(C, float(initial != "until-seen")), np.zeros(C)
    buffer = None
    for x, y in ((x.numpy(), y.numpy()) for x, y in minibatches()):
        g, own, p = measure(w, u, x, y)
        for k in set(y.tolist()):
            members = y == k
            c = own[members].sum(0) if reduction == "class-sum" else own[members].mean(0)
            curvature = (p * (1 - p))[members].sum() * (c @ c) / (1 if reduction == "batch-sum" else len(y))
            times[k] += 1
            average[k] = GAMMA * average[k] + (1 - GAMMA) * c
            squares[k] = GAMMA * squares[k] + (1 - GAMMA) * curvature**2
        known = times > 0
        correction = 1.0 if initial == "averaged" else 1 - GAMMA ** times[known]
        curvatures = np.sqrt(squares[known] / correction)
        directions, coordinates, rest = split(average[known] / np.linalg.norm(average[known], axis=1)[:, None], g, how)
        factor = lr if scale == "lr" else scale
        step = lr * rest + factor * (coordinates / curvatures) @ directions
        buffer = step if buffer is None else momentum * buffer + (1 - dampening) * step
        w -= buffer[: w.size].reshape(w.shape)
        u -= buffer[w.size :].reshape(u.shape)
    return w, u


PRINTED = {"dampening": 0.0, "how": "all", "initial": "until-seen", "reduction": "mean", "scale": 1.0}
READINGS = [
    PRINTED,
    *({**PRINTED, **change} for change in (
        {"dampening": 0.9},
        {"initial": "averaged"},
        {"initial": "averaged-corrected"},
        {"how": "sequential"},
        {"how": "qr"},
        {"how": "symmetric"},
        {"scale": "lr"},
        {"reduction": "class-sum"},
        {"reduction": "batch-sum"},
        {"dampening": 0.9, "initial": "averaged", "how": "sequential", "scale": "lr", "reduction": "class-sum"},
        {"dampening": 0.9, "initial": "averaged-corrected", "how": "qr", "reduction": "batch-sum"},
        {"dampening": 0.9, "initial": "averaged", "how": "symmetric", "scale": 0.5},
    )),
]  # fmt: skip


def changes(reading: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in reading.items() if v != PRINTED[k]) or "printed"


@pytest.mark.parametrize("reading", READINGS, ids=changes)
def test_three_steps_of_a_reading_equal_the_hand_computation(reading: dict[str, Any]) -> None:
    lr = 0.01
    w, u = by_hand(lr, 0.9, **reading)
    options = {key: value for key, value in reading.items() if key != "how"}
    options["orthonormal"] = reading["how"] if reading["how"] in ("qr", "symmetric") else False
    options["sequential"] = reading["how"] == "sequential"
    model = network()
    optimizer = class_gradient_newton(model, num_classes=C, lr=lr, momentum=0.9, gamma=GAMMA, **options)
    for x, y in minibatches():
        optimizer.step(x, y)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), w, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(model[2].weight.detach().numpy(), u, rtol=1e-10, atol=1e-10)


def test_the_readings_differ() -> None:
    """Else the test above could not tell them apart."""
    results = [np.concatenate([part.ravel() for part in by_hand(0.01, 0.9, **reading)]) for reading in READINGS]
    distances = [np.abs(a - b).max() for i, a in enumerate(results) for b in results[:i]]
    assert min(distances) > 1e-6


@pytest.mark.parametrize("momentum_on", ["step", "cospace"])
def test_a_running_average_follows_the_momentum_in_use(momentum_on: str) -> None:
    """Also where a schedule has moved it: dampening None is as much as the momentum."""
    results = []
    for dampening in (None, 0.5):
        optimizer = class_gradient_newton(
            network(), num_classes=C, lr=0.01, momentum=0.9, dampening=dampening, damping=1.0, momentum_on=momentum_on
        )
        optimizer.param_groups[0]["momentum"] = 0.5
        for x, y in minibatches():
            optimizer.step(x, y)
        results.append(parameter_vector(optimizer.model))
    assert torch.equal(*results)


def test_dampened_momentum_of_the_rule_outside_is_that_of_torch() -> None:
    rule, weights = GradientDescent(0.1, 0.9, 0.9), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference, total = torch.optim.SGD([weights], lr=0.1, momentum=0.9, dampening=0.9), torch.zeros(4).double()
    for gradient in torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        weights.grad = gradient.clone()
        reference.step()
        total -= rule.step(gradient, rule.defaults, None)
    torch.testing.assert_close(total, weights.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("form", [sequential_span, ordered_span, symmetric_span])
def test_spans_of_dependent_and_missing_rows(form: Any) -> None:
    """A repeated row and a row of zeros: finite, and what is left of a vector is orthogonal to the last row taken."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    rows[1], rows[2] = 0, 3 * rows[0]
    vector = torch.randn(20, generator=generator, dtype=torch.float64)
    span = form(rows)
    rest = span.reject(vector)
    assert abs(rest @ rows[3]) < 1e-12
    if span.orthonormal:
        q = torch.linalg.qr(rows[[0, 3]].T)[0]
        torch.testing.assert_close(span.matrix() @ span.matrix().T, q @ q.T, rtol=0, atol=1e-12)
    else:
        assert torch.linalg.vector_norm(rest) <= torch.linalg.vector_norm(vector)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": "until seen"}, "until-seen"),
        ({"initial": "weighted"}, "averaged"),
        ({"initial": "never"}, "averaged-corrected"),
        ({"orthonormal": "Qr"}, "symmetric"),
        ({"reduction": "sum"}, "class-sum"),
        ({"scale": "eta"}, '"lr"'),
        ({"scale": 0.0}, "positive"),
        ({"dampening": 1.0}, "dampening"),
    ],
)
def test_an_unknown_reading_is_refused_with_what_there_is(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_gradient_newton(network(), num_classes=C, **options)


def test_any_orthonormal_basis_has_no_estimate_of_its_own() -> None:
    optimizer = SubspaceNewton(network(), ClassGradients(orthonormal=True), DiagonalNewton(), GradientDescent(0.1))
    with pytest.raises(ValueError, match="no estimate"):
        optimizer.step(*minibatches()[0])


def test_the_default_is_the_reading_that_meets_most() -> None:
    reading = {**PRINTED, "dampening": 0.9, "initial": "averaged", "how": "qr"}
    w, _ = by_hand(0.1, 0.9, **reading)
    model = network()
    optimizer = class_gradient_newton(model, num_classes=C, lr=0.1, momentum=0.9, gamma=GAMMA)
    for x, y in minibatches():
        optimizer.step(x, y)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), w, rtol=1e-10, atol=1e-10)
