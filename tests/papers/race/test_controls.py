"""The race's controls, each against a loop written out in numpy-like steps of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvspace.optim import registry
from papers.race.controls import adam_step_projected, last_layer_sgd


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(12, 6).double(), torch.arange(12) % 3) for _ in range(4)]
    return model, batches


def test_the_last_layer_alone_is_slower(problem):
    model, batches = problem
    slow, plain = copy.deepcopy(model), model
    opt = last_layer_sgd(slow, lr=0.2, factor=0.1, momentum=0.9, nesterov=True)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    rates = [0.2, 0.2, 0.02, 0.02]
    for x, y in batches:
        opt.step(x, y)
        grads = torch.autograd.grad(F.cross_entropy(plain(x), y), list(plain.parameters()))
        with torch.no_grad():
            for p, g, v, rate in zip(plain.parameters(), grads, velocity, rates, strict=True):
                v.mul_(0.9).add_(g)
                p -= rate * (g + 0.9 * v)
    for a, b in zip(slow.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedule_moves_both_rates(problem):
    opt = last_layer_sgd(problem[0], lr=0.2, factor=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt.inner, lambda _: 0.5)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.1, 0.01])


def test_a_model_of_one_layer_has_one_rate():
    opt = last_layer_sgd(nn.Linear(4, 2), lr=0.2, factor=0.1)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.02])


def test_adams_moments_are_the_whole_gradients_and_its_step_leaves_the_span(problem):
    """Against Adam written out, and class gradients by a loop over classes: mean gradient of logit k over class k."""
    model, batches = problem
    ours = copy.deepcopy(model)
    opt = adam_step_projected(ours, 3, lr=0.01, momentum=0.8, refresh_every=1)
    parameters = list(model.parameters())
    average = mean = square = 0.0
    for t, (x, y) in enumerate(batches, start=1):
        opt.step(x, y)
        rows = []
        for k in range(3):
            logit = model(x[y == k])[:, k].mean()
            found = torch.autograd.grad(logit, parameters, allow_unused=True)
            filled = [torch.zeros_like(p) if d is None else d for d, p in zip(found, parameters, strict=True)]
            rows.append(torch.cat([d.flatten() for d in filled]))
        average = 0.9 * average + 0.1 * torch.stack(rows)
        q = torch.linalg.qr(average.T)[0]
        loss = F.cross_entropy(model(x), y)
        g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, parameters)])
        mean, square = 0.8 * mean + 0.2 * g, 0.999 * square + 0.001 * g**2
        step = 0.01 * (mean / (1 - 0.8**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        step = step - q @ (q.T @ step)
        with torch.no_grad():
            for p, d in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                p -= d.view_as(p)
    for a, b in zip(ours.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["last_layer_sgd", "adam_step_projected"])
def test_controls_are_kinds_of_a_config(problem, name):
    x, y = problem[1][0]
    opt = registry.build(f"papers.race.controls:{name}", {"momentum": 0.9}, problem[0], 3, 0.01)
    assert float(opt.step(x, y)) > 0
