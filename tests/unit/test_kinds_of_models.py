"""Models that differentiate, transform, checkpoint, compile or normalise themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvspace import Objective, class_gradients
from curvspace.functional import assign_parameters, parameter_vector
from tests.unit.oracles import central_difference
from tests.unit.small_networks import Fn, minibatch, mlp


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
    x, y = minibatch(n)
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


TRANSFORMS = {
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_that_uses_functional_transforms(transform, n):
    """Its outputs are made of a network's derivative in its inputs."""
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    model = Fn(
        lambda s, x: s.head(TRANSFORMS[transform](lambda z: s.energy(z).sum(), x)), energy=energy, head=nn.Linear(4, 3)
    ).double()
    x, y = minibatch(n)
    objective = Objective(model, [(x, y)])
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(objective.hessian() @ v, central_difference(model, [(x, y)], "cross_entropy", v))
    kept = Objective(model, [(x, y)], engine="linearize").gauss_newton() @ v
    torch.testing.assert_close(objective.gauss_newton() @ v, kept)


SCRIPTED = {
    "script": (lambda m, x: torch.jit.script(m), "it was compiled by torch.jit.script"),
    "trace": (torch.jit.trace, "it was compiled by torch.jit.script or torch.jit.trace"),
    "one module": (lambda m, x: nn.Sequential(torch.jit.script(m)), "its module '0' was compiled"),
    "a module in a module": (
        lambda m, x: Fn(lambda s, x: s.inner(x), inner=nn.Sequential(torch.jit.script(m[0]), *m[1:])),
        "'inner.0'",
    ),
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_nothing_elsewhere(reentrant):
    """A recomputation in the backward pass would see the parameters of then."""
    plain, (x, y) = mlp(), minibatch()
    inner, outer = plain[:2], plain[2]
    model = Fn(lambda s, x: s.b(checkpoint(s.a, x, use_reentrant=reentrant)), a=inner, b=outer)
    v = torch.randn(43).double()
    expected = Objective(plain, (x, y)).hessian() @ v
    H = Objective(model, (x, y)).hessian()
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        plain[0].weight.mul_(3)
    torch.testing.assert_close(H @ v, expected, rtol=0, atol=1e-14)
    H.refresh()
    torch.testing.assert_close(H @ v, Objective(plain, (x, y)).hessian() @ v, rtol=0, atol=1e-14)


def test_complex_parameters_are_refused_and_mixed_ones_have_the_finer_type():
    model = nn.Linear(5, 3)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameter 'phase' is complex"):
        Objective(model, (torch.zeros(2, 5), torch.zeros(2).long()))
    mixed = nn.Sequential(nn.Linear(5, 4).bfloat16(), nn.Linear(4, 3))
    objective = Objective(mixed, (torch.ones(2, 5), torch.zeros(2).long()))
    H = objective.hessian()
    assert H.dtype == torch.float32
    assert H.rounding == torch.finfo(torch.float32).eps
    assert Objective(nn.Linear(5, 3).bfloat16(), (torch.ones(2, 5), torch.zeros(2).long())).hessian().rounding == 2**-7


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(in_place):
    inner, (x, y), v = mlp(), minibatch(), torch.ones(43).double()
    expected = Objective(inner, (x, y)).hessian() @ v
    compiled = nn.Sequential(torch.compile(inner[:2], backend="aot_eager"), inner[2])
    if in_place:
        compiled = copy.deepcopy(inner)
        compiled.compile(backend="aot_eager")
    torch.testing.assert_close(Objective(compiled, (x, y)).hessian() @ v, expected, rtol=0, atol=1e-14)
    whole = torch.compile(inner, backend="aot_eager")
    torch.testing.assert_close(Objective(whole, (x, y)).hessian() @ v, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_embeddings(bag):
    torch.manual_seed(0)
    kind = nn.EmbeddingBag if bag else nn.Embedding
    model = nn.Sequential(kind(7, 5, sparse=True), nn.Tanh(), *([] if bag else [nn.Flatten()]))
    model.append(nn.Linear(5 if bag else 20, 3))
    model, x, y = model.double(), torch.randint(7, (9, 4)), torch.randint(3, (9,))
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    sparse, dense = Objective(model, (x, y)), Objective(dense, (x, y))
    assert model[0].sparse
    torch.testing.assert_close(sparse.gradient(), dense.gradient())
    if bag:  # torch has no second derivative of it
        with pytest.raises(RuntimeError, match="not implemented"):
            sparse.hessian() @ torch.ones(sparse.num_parameters).double()
        return
    v = torch.randn(sparse.num_parameters).double()
    torch.testing.assert_close(sparse.hessian() @ v, dense.hessian() @ v)
    torch.testing.assert_close(sparse.gauss_newton() @ v, dense.gauss_newton() @ v)


class OwnNorm(nn.Module):
    """Batch normalisation that a user has written, and a dropout that no class tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(5))
        self.register_buffer("running_var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", ["batch", "running", None])
def test_a_normalisation_and_a_dropout_of_ones_own(batch_norm, training):
    torch.manual_seed(0)
    a, b, (x, y) = nn.Linear(4, 5), nn.Linear(5, 3), minibatch()
    ours, theirs = (
        nn.Sequential(a, norm, OwnDropout(), b).double().train(training)
        for norm in (OwnNorm(), nn.BatchNorm1d(5, affine=False))
    )
    found, expected = (Objective(m, (x, y), batch_norm=batch_norm) for m in (ours, theirs))
    assert found.policy == expected.policy
    torch.testing.assert_close(found.loss(), expected.loss())
    torch.testing.assert_close(found.gradient(), expected.gradient())
    assert not ours[1].running_mean.any()
    assert ours[1].training is ours[2].training is training


class Field(nn.Module):
    """A field u(x) with the points at which it was taken, by which a loss differentiates it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        return x, self.u(x)


def equation(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    x, u = outputs
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope.sum(1) - y).square().mean()


@pytest.mark.parametrize("microbatch", [None, 4])
def test_a_loss_that_differentiates_the_outputs_by_the_inputs(microbatch):
    model, x = Field(), torch.randn(9, 2).double()
    batches = [(x[:6], x[:6, 0].cos()), (x[6:], x[6:, 0].cos())]
    objective = Objective(model, batches, equation, microbatch=microbatch)
    v = torch.randn(objective.num_parameters).double()
    expected = central_difference(model, batches, equation, v)
    torch.testing.assert_close(objective.hessian() @ v, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="derivatives of the outputs by inputs are to be outputs themselves"):
        objective.gauss_newton() @ v
