"""The toy model: its exact solution against its own differential equation, descent, and double backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvspace.datasets.generated import gaussian_mixture
from papers.b import toy
from papers.b.measures_toy import toy_model
from papers.b.tables import toy_checks
from papers.b.verdicts import toy_exact
from papers.common.context import Context
from papers.common.outcomes import FAILS


def points(classes: int, dimension: int = 30, bias: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """One example for each class, at orthonormal means."""
    data = gaussian_mixture(classes, dimension, 0.0, 1, orthonormal=True, seed=3)
    return (toy.with_bias(data.train_inputs) if bias else data.train_inputs), data.train_targets


@pytest.mark.parametrize(("classes", "margin"), [(2, 0.0), (2, -1.5), (5, 0.0), (10, 2.0)])
def test_closed_form_solves_its_equation(classes, margin):
    time, h = np.array([0.5, 4.0, 60.0, 2000.0]), 1e-3
    derivative = (
        toy.closed_form(time + h, classes, margin).margin - toy.closed_form(time - h, classes, margin).margin
    ) / (2 * h)
    exp_m = np.exp(toy.closed_form(time, classes, margin).margin)
    np.testing.assert_allclose(derivative, 1 / (exp_m + classes - 1), rtol=1e-5)
    np.testing.assert_allclose(toy.closed_form(np.array(0.0), classes, margin).margin, margin, atol=1e-12)


def test_spectrum_and_gradient_against_double_backward():
    random = np.random.default_rng(0)
    inputs, labels, theta = random.standard_normal((7, 4)), random.integers(0, 3, 7), random.standard_normal((3, 4))
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    flat = torch.from_numpy(theta.reshape(-1).copy()).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ flat.view(3, 4).T, y)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, flat, retain_graph=True)[0] for g in gradient]).numpy()
    value, found = toy.loss_and_gradient(theta, inputs, labels)
    np.testing.assert_allclose(value, loss.item())
    np.testing.assert_allclose(found.reshape(-1), gradient.detach().numpy(), atol=1e-14)
    values, vectors = toy.spectrum(theta, inputs)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(hessian)[::-1], atol=1e-12)
    np.testing.assert_allclose(vectors[:, :4] * values[:4], hessian @ vectors[:, :4], atol=1e-12)


def test_spectrum_is_the_same_from_either_gram_matrix():
    random = np.random.default_rng(1)
    inputs, theta = random.standard_normal((3, 6)), random.standard_normal((2, 6))
    few, _ = toy.spectrum(theta, inputs)  # nk < kd
    repeated, _ = toy.spectrum(theta, np.tile(inputs, (5, 1)))  # nk > kd, the same mean loss
    np.testing.assert_allclose(few, repeated[: len(few)], atol=1e-13)


def test_descent_in_the_span_is_gradient_descent():
    random = np.random.default_rng(2)
    inputs, labels, theta = random.standard_normal((9, 12)), random.integers(0, 4, 9), random.standard_normal((4, 12))
    plain = theta.copy()
    for _ in range(25):
        plain -= 0.3 * toy.loss_and_gradient(plain, inputs, labels)[1]
    found = dict(toy.descend(theta, inputs, labels, 0.3, [0, 10, 25]))
    np.testing.assert_allclose(found[0], theta)
    np.testing.assert_allclose(found[25], plain, atol=1e-13)
    with pytest.raises(ValueError, match="increase"):
        list(toy.descend(theta, inputs, labels, 0.3, [5, 4]))


@pytest.mark.parametrize("classes", [2, 5])
def test_small_steps_follow_the_exact_solution(classes):
    inputs, labels = points(classes)
    lr, step = 0.02, 3000
    ((_, theta),) = toy.descend(np.zeros((classes, 30)), inputs, labels, lr, [step])
    exact = toy.closed_form(np.array(lr * step), classes)
    values, vectors = toy.spectrum(theta, inputs)
    _, gradient = toy.loss_and_gradient(theta, inputs, labels)
    np.testing.assert_allclose(values[:classes], exact.top, rtol=2e-3)
    np.testing.assert_allclose(values[classes : classes * (classes - 1)], exact.rest, rtol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(gradient), exact.gradient_norm, rtol=2e-3)
    assert np.sum(values > 1e-12 * values[0]) == classes * (classes - 1), "rank k(k - 1)"
    shares = (vectors[:, :classes].T @ gradient.reshape(-1)) ** 2 / np.sum(gradient**2)
    np.testing.assert_allclose(shares.sum(), 1.0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_late_eigenvalues_are_within_one_percent_of_one_over_time(classes):
    inputs, labels = points(classes)
    lr, step = 1.0, 10_000
    ((_, theta),) = toy.descend(np.zeros((classes, 30)), inputs, labels, lr, [step])
    values, _ = toy.spectrum(theta, inputs)
    np.testing.assert_allclose(lr * step * values[:classes], 1.0, atol=0.01)
    if classes > 2:  # the k(k - 2) others are k times smaller
        np.testing.assert_allclose(classes * values[classes] / values[0], 1.0, atol=0.01)


def test_with_biases_the_gradient_aligns_with_the_smaller_eigenvalue():
    inputs, labels = points(2, bias=True)
    start = 0.5 * np.random.default_rng(5).standard_normal((2, 31))
    found = toy.descend(start, inputs, labels, 0.5, [0, 4000])
    alignment, values = [], np.empty(0)
    for _, theta in found:
        values, vectors = toy.spectrum(theta, inputs)
        gradient = toy.loss_and_gradient(theta, inputs, labels)[1].reshape(-1)
        alignment.append((vectors[:, 1] @ gradient) ** 2 / (gradient @ gradient))
    assert alignment[0] < 0.95
    assert alignment[1] > 0.9999
    np.testing.assert_allclose(values[0] / values[1], 3.0, rtol=1e-2)  # Gram matrix [[2, 1], [1, 2]]


def test_measure_lists_the_noise_bulk_and_the_checks():
    cases = [{"classes": 2}, {"classes": 2, "sigma": 0.01}, {"classes": 2, "sigma": 0.02}]
    table = toy_model(
        Context(show_progress=False), cases=cases, times=[0, 2000], lr=1.0, dimension=40, per_class=4, listed=5
    )
    late = table[table["time"] == 2000]
    bulk = late[late["quantity"] == "bulk_edge"].set_index("sigma")["value"]
    np.testing.assert_allclose(bulk[0.02] / bulk[0.01], 4.0, rtol=0.05)  # O(sigma^2)
    assert abs(bulk[0.0]) < 1e-15
    checks = toy_checks({"toy": table})
    solved = checks[checks["expected"].notna() & (checks["expected"] != 0)]
    assert {"eigenvalue", "gradient_norm", "loss", "rank", "f_top"} <= set(solved["quantity"])
    assert solved["relative_error"].abs().max() < 0.01
    top = checks[(checks["quantity"] == "eigenvalue") & (checks["index"] == 1) & (checks["sigma"] == 0)]
    np.testing.assert_allclose(top["time_times_value"], 1.0, atol=0.01)


def test_unequal_margins_of_two_classes_evolve_apart():
    table = toy_model(
        Context(show_progress=False), cases=[{"classes": 2, "start": 0.5}], times=[20], lr=0.01, dimension=40
    )
    solved = table[table["expected"].notna() & (table["expected"] != 0)]
    values = solved[solved["quantity"] == "eigenvalue"]["expected"].to_numpy()
    assert values[0] / values[1] > 1.01, "the start separates the two eigenvalues"
    np.testing.assert_allclose(solved["value"], solved["expected"], rtol=3e-3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="classes"):
        toy.closed_form(np.array(1.0), 1)
    with pytest.raises(ValueError, match="time"):
        toy.closed_form(np.array(-1.0), 2)
    with pytest.raises(ValueError, match="sgima"):
        toy_model(Context(show_progress=False), cases=[{"sgima": 0.1}], times=[1])


def test_the_gradient_is_looked_at_all_times_but_where_no_eigenvalues_are_the_top_ones():
    """At the symmetric start all k(k - 1) eigenvalues are equal, and no k of them are the top ones."""
    cases = [{"classes": 2, "start": 0.5}, {"classes": 5}]
    table = toy_model(Context(show_progress=False), cases=cases, times=[0, 1, 50], lr=0.05, dimension=40)
    inside = table[table["quantity"] == "f_top"].set_index(["classes", "time"])
    assert np.isnan(inside.loc[(5, 0), "expected"])
    assert inside.loc[(5, 0), "value"] < 0.9
    known = inside[inside["expected"].notna()]
    assert len(known) == 5
    np.testing.assert_allclose(known["value"], 1.0, atol=1e-9)
    table.loc[(table["quantity"] == "f_top") & (table["classes"] == 5) & (table["time"] == 1), "value"] = 0.4
    checks = toy_checks({"toy": table})
    lowest = checks[checks["quantity"] == "lowest f_top"].set_index("classes")
    assert lowest["value"].to_dict() == pytest.approx({2: 1.0, 5: 0.4})
    assert lowest["time"].to_dict()[5] == 1
    assert toy_exact({"toy": checks}).verdict == FAILS
