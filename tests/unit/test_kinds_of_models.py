"""Models that differentiate, transform, checkpoint, compile or normalise themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective, class_gradients
from curvspace.functional import assign_parameters, parameter_vector
from tests.unit.oracles import central_difference
from tests.unit.small_networks import minibatch, mlp


class Derivative(nn.Module):
    """Outputs made of the first or second derivative of a network in its inputs, or of that and the network itself."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        z = x.detach().requires_grad_()
        e = self.energy(z)
        (slope,) = torch.autograd.grad(e.sum(), z, create_graph=True)
        if self.kind == "twice":
            (slope,) = torch.autograd.grad(slope.square().sum(), z, create_graph=True)
        return self.head(slope if self.kind != "both" else slope + e)


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("kind", ["once", "twice", "both"])
def test_a_model_that_takes_derivatives_in_its_inputs(kind, n):
    torch.manual_seed(0)
    model = Derivative(kind).double()
    x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
    objective = Objective(model, [(x, y)])
    theta = parameter_vector(model)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(1)).double()
    assert objective.loss() == pytest.approx(F.cross_entropy(model(x), y).item())
    product, by_differences = objective.hessian() @ v, objective.hessian_by_differences() @ v
    gauss_newton = objective.gauss_newton() @ v
    assert float(v @ gauss_newton) > 0
    slope, h = float(objective.gradient() @ v), 1e-5
    values, gradients = [], []
    for sign in (1, -1):
        assign_parameters(model, theta + sign * h * v)
        values.append(objective.loss())
        gradients.append(objective.gradient())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(by_differences, product, rtol=1e-6, atol=1e-7)


class FunctionalSlope(nn.Module):
    """Outputs made of a network's derivative in its inputs, by ``torch.func``."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform
        self.energy, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.transform(lambda z: self.energy(z).sum(), x))


TRANSFORMS = {
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_that_uses_functional_transforms(transform, n):
    torch.manual_seed(0)
    model = FunctionalSlope(TRANSFORMS[transform]).double()
    x, y = minibatch(n)
    objective = Objective(model, [(x, y)])
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(objective.hessian() @ v, central_difference(model, [(x, y)], "cross_entropy", v))
    kept = Objective(model, [(x, y)], engine="linearize").gauss_newton() @ v
    torch.testing.assert_close(objective.gauss_newton() @ v, kept)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


SCRIPTED = {
    "script": (lambda m, x: torch.jit.script(m), "it was compiled by torch.jit.script"),
    "trace": (torch.jit.trace, "it was compiled by torch.jit.script or torch.jit.trace"),
    "one module": (lambda m, x: nn.Sequential(torch.jit.script(m)), "its module '0' was compiled"),
    "a module in a module": (lambda m, x: Holder(nn.Sequential(torch.jit.script(m[0]), *m[1:])), "'inner.0'"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", SCRIPTED)
def test_a_scripted_model_is_refused(kind):
    x, y = minibatch()
    make, message = SCRIPTED[kind]
    model = make(mlp(), x)
    with pytest.raises(TypeError, match=message):
        Objective(model, [(x, y)])
    with pytest.raises(TypeError, match=message):
        class_gradients(model, x, y, 3)
