"""Flat vectors and parameters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from curvspace.batches import batch_size, select
from curvspace.differentiation import pull_back
from curvspace.functional import (
    add_to_parameters,
    assign_parameters,
    call_with,
    flatten,
    parameter_vector,
    trainable_parameters,
    unflatten,
)
from curvspace.inputs import call
from curvspace.module_state import preserved_buffers
from curvspace.seeds import replayed_randomness, seed_generators


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    return model


def test_vectors_are_in_the_order_of_named_parameters_without_the_frozen():
    model = _model()
    assert list(trainable_parameters(model)) == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    assert torch.equal(parameter_vector(model), expected)


def test_flatten_and_unflatten_are_inverse():
    like = [torch.randn(2, 3), torch.randn(()), torch.randn(4)]
    parts = unflatten(flatten(like), like)
    assert all(torch.equal(a, b) for a, b in zip(parts, like, strict=True))
    with pytest.raises(ValueError, match=r"expected a vector of 11 entries, got shape \(10,\)"):
        unflatten(torch.zeros(10), like)


def test_parameters_are_assigned_and_added_to():
    model = _model()
    theta = parameter_vector(model)
    v = torch.arange(float(len(theta)))
    assign_parameters(model, v)
    add_to_parameters(model, v, alpha=0.5)
    assert torch.equal(parameter_vector(model), 1.5 * v)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_forms_of_inputs(form):
    x = torch.randn(5, 2)
    inputs = {"tensor": x, "tuple": (x,), "mapping": {"input": x}}[form]
    model = nn.Linear(2, 3)
    assert batch_size(inputs) == 5
    assert torch.equal(call(model, select(inputs, slice(1, 3))), model(x[1:3]))
    doubled = {n: 2 * p for n, p in model.named_parameters()}
    torch.testing.assert_close(call_with(model, doubled, inputs), 2 * model(x))


def test_preserved_buffers_and_replayed_randomness():
    model = _model().train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with preserved_buffers(model):
        model(torch.randn(4, 2))
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    draws = []
    for _ in range(2):
        with replayed_randomness(torch.device("cpu"), seed=1):
            draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_generators_of_a_device_are_seeded_as_by_torch():
    torch.manual_seed(2**62)
    expected = torch.rand(3)
    seed_generators(2**62, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_pull_back_is_the_transposed_jacobian(batched):
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(4, requires_grad=True)

    def outputs(x, y):
        return (x @ y).sin(), (x * y).t() ** 2  # the second is not contiguous

    jacobian = torch.autograd.functional.jacobian(outputs, (x, y))
    u = [torch.randn(5, *z.shape, dtype=torch.float64) for z in outputs(x, y)]
    found = pull_back(
        outputs(x, y), [x, y, unused], u if batched else [t[0] for t in u], batched=batched, materialize_grads=True
    )
    for i, g in enumerate(found[:2]):
        expected = sum(torch.tensordot(t, j[i], j[i].ndim - (x, y)[i].ndim) for t, j in zip(u, jacobian, strict=True))
        torch.testing.assert_close(g, expected if batched else expected[0])
    assert not found[2].any()


def test_a_product_with_the_hessian_does_not_wait_for_sympy():
    code = (
        "import sys, torch; from curvspace import Objective\n"
        "objective = Objective(torch.nn.Linear(3, 3), [(torch.ones(2, 3), torch.tensor([0, 1]))])\n"
        "objective.hessian() @ torch.ones(12), objective.gauss_newton() @ torch.ones(12)\n"
        "sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
