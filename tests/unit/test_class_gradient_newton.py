"""Paper A: its method by hand, and its averages."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from curvspace.optim import ClassGradients, DiagonalNewton, Drop, GradientDescent, SubspaceNewton, class_gradient_newton
from tests.unit.small_networks import C, D, batches, linear_softmax

PRINTED = {"dampening": 0.0, "orthonormal": False}
"""Heavy-ball momentum, unit class gradients as they are."""


def paper_a_by_hand(model, data, lr, momentum, gamma, on_step, initial, damping=0.0, floor=0.0):
    """Eq. 12, 15, 16, 17 for a linear softmax model in scalars and lists: no autograd, no code of the library."""
    w = [[*row, b] for row, b in zip(model.weight.tolist(), model.bias.tolist(), strict=True)]
    size = C * (D + 1)
    sums, seen = [[0.0] * size for _ in range(C)], [0] * C
    squares = [1.0 if initial == "averaged" else 0.0] * C
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
            correction = 1 if initial == "averaged" else 1 - gamma ** seen[k]
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


@pytest.mark.parametrize("initial", ["until-seen", "averaged"])
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
    optimizer = class_gradient_newton(model, num_classes=C, initial=initial, **PRINTED, **options)
    for x, y in data:
        optimizer.step(x, y)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=0, atol=1e-10)


def test_damping_and_floor_enter_as_documented() -> None:
    data, model = batches(3), linear_softmax()
    weight, _ = paper_a_by_hand(model, data, 0.1, 0.0, 0.9, False, "until-seen", damping=0.3, floor=0.2)
    optimizer = class_gradient_newton(
        model, num_classes=C, lr=0.1, momentum=0.0, initial="until-seen", damping=0.3, floor=0.2, **PRINTED
    )
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
