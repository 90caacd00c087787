"""What autograd returns is not always the derivative of the loss, and not always differentiable: said, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective
from curvspace.curvature import dense_matrix
from curvspace.functional import parameter_vector
from curvspace.optim import CurveBall, NegativeCurvature
from tests.unit.backward_passes import by_hand
from tests.unit.oracles import central_difference, dense_gauss_newton, jacobian_product
from tests.unit.small_networks import Fn, minibatch


def _clipped(h):
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return h


def _shut(h):
    with torch.no_grad():
        return h.tanh()


class _Middle(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.first, self.f, self.last = nn.Linear(4, 5), f, nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.f(self.first(x))))


OWN_DERIVATIVES = {
    "reversed": by_hand(lambda x: x.view_as(x), lambda g, x: -g),
    "detached norm": lambda h: h / h.detach().norm(dim=1, keepdim=True),
    "straight through": lambda h: h + (h.round() - h).detach(),
    "hook": _clipped,
    "no_grad": _shut,
}
HONEST = {
    "smooth": torch.sin,
    "kinks": F.relu,
    "jumps": lambda h: h * (h > 0.3),
    "rounded": lambda h: h.float().double(),
}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", [*OWN_DERIVATIVES, *HONEST])
def test_a_gradient_that_is_no_derivative_is_said_once(name, matrix):
    torch.manual_seed(0)
    model = _Middle((OWN_DERIVATIVES | HONEST)[name]).double()
    objective = Objective(model, [minibatch()])
    refused = name == "hook" and matrix != "hessian"  # it is not linear either: there is no Jacobian
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="is not linear") if refused else nullcontext():
                getattr(objective, matrix)()
    assert sum("not the derivative of the loss" in str(w.message) for w in caught) == (name in OWN_DERIVATIVES)


class _Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.gradient = (z.softmax(1) - F.one_hot(y, 3)) / len(z)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gradient, None


def _cube(x):
    return x**3


def _under_no_grad(g, x):
    with torch.no_grad():
        return 3 * x**2 * g


def _implicit(h):
    """The fixed point z of tanh(0.3 z W + h), whose cotangent a hook solves for."""
    w = torch.linspace(-1, 1, 25).view(5, 5).to(h)
    with torch.no_grad():
        z = torch.zeros_like(h)
        for _ in range(60):
            z = torch.tanh(0.3 * z @ w + h)
    z = torch.tanh(0.3 * z @ w + h)
    if z.requires_grad:
        here = z.detach().requires_grad_()
        there = torch.tanh(0.3 * here @ w + h.detach())

        def solve(g):
            found = g
            for _ in range(60):
                found = g + torch.autograd.grad(there, here, found, retain_graph=True)[0]
            return found

        z.register_hook(solve)
    return z


NOT_DIFFERENTIABLE = {  # function, and for which matrices that matters
    "constant": (by_hand(_cube, lambda g, x: 3 * x.detach() ** 2 * g), ["hessian"]),
    "no_grad": (by_hand(_cube, _under_no_grad), ["hessian", "gauss_newton", "empirical_fisher"]),
    "numpy": (
        by_hand(_cube, lambda g, x: torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())),
        ["hessian", "gauss_newton", "empirical_fisher"],
    ),
    "implicit": (_implicit, ["hessian", "gauss_newton", "empirical_fisher"]),
    "fused loss": (torch.sin, ["hessian", "gauss_newton"]),
}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_a_backward_pass_that_autograd_cannot_differentiate(name, matrix):
    torch.manual_seed(0)
    f, wrong = NOT_DIFFERENTIABLE[name]
    model, (x, y) = _Middle(f).double(), minibatch()
    objective = Objective(model, [(x, y)], _Fused.apply if name == "fused loss" else "cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if matrix not in wrong:
            getattr(objective, matrix)()
            return
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"_Middle with the loss .* is off by .* of the difference of first"):
                getattr(objective, matrix)()
        if name == "fused loss":
            objective = Objective(model, [(x, y)])
        v = torch.ones(objective.num_parameters).double()
        expected = central_difference(model, [(x, y)], "cross_entropy", v)
        torch.testing.assert_close(objective.hessian_by_differences() @ v, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"scale_grad_by_freq": True}, "scale_grad_by_freq"), ({"max_norm": 0.5}, "max_norm"), ({"padding_idx": 0}, None)],
)
def test_embeddings_whose_gradient_is_no_derivative(options, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(9, 3)).double()
    batch = torch.tensor([[1, 1, 1], [1, 2, 3], [0, 1, 4], [2, 2, 0]]), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(model, [batch], parameters="2.*").hessian()
        if said is None:
            Objective(model, [batch]).hessian()
            return
        with pytest.raises(ValueError, match=f"the embedding '0' has {said}"):
            Objective(model, [batch]).hessian()


SHARED = {
    "same": lambda w: w,
    "transposed": lambda w: w.T,
    "rows": lambda w: w[1:],
    "columns": lambda w: w[:, ::2],
    "crossed columns": lambda w: w[:, 1::2].T,
}


@pytest.mark.parametrize("name", SHARED)
def test_two_parameters_in_one_memory_are_named(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model.other = nn.Parameter(SHARED[name](model[2].weight.data))
    with pytest.warns(RuntimeWarning, match=r"'other' and '2.weight' lie in the same|'2.weight' and 'other' lie"):
        Objective(model, [minibatch()]).hessian()


def test_a_parameter_in_one_memory_with_itself_is_named_and_interleaved_ones_are_not():
    memory, (x, y) = torch.randn(4, 6).double(), minibatch()
    parts = {"left": memory[:, :3], "right": memory[:, 3:], "even": torch.randn(8, 3).double()[::2]}
    model = Fn(
        lambda s, x: x @ s.left + (x @ s.right).tanh() @ s.even[:3], **{k: nn.Parameter(v) for k, v in parts.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(model, [(x, y)]).hessian()
    model = Fn(lambda s, x: x @ s.w, w=nn.Parameter(torch.randn(1, 3).double().expand(4, 3)))
    with pytest.warns(RuntimeWarning, match=r"entries of the parameter 'w' lie in the same memory"):
        Objective(model, [(x, y)]).hessian()


def _gated_recurrence(h: Tensor) -> Tensor:
    """The last state of a gated linear recurrence over the columns, evaluated in logarithms."""
    kept = F.logsigmoid(h).cumsum(1)
    last = (kept + (F.logsigmoid(-h) - kept).logcumsumexp(1)).exp()[:, -1:]
    return last.expand(-1, 5)


NOT_FINITE = {
    "running log-sum": _gated_recurrence,
    "length of nothing": lambda h: h / (1 + (h * (torch.arange(len(h)) % 2)[:, None]).norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_second_derivatives_that_are_not_finite(name):
    """torch's, of operations whose first derivatives are right: differences of these are the Hessian."""
    torch.manual_seed(0)
    model, batches = _Middle(NOT_FINITE[name]).double(), [minibatch()]
    objective = Objective(model, batches)
    with pytest.raises(RuntimeError, match=r"Hessian is not finite, though .*hessian_by_differences"):
        objective.hessian()
    v = torch.randn(objective.num_parameters).double()
    expected = central_difference(model, batches, "cross_entropy", v)
    torch.testing.assert_close(objective.hessian_by_differences() @ v, expected, rtol=1e-5, atol=1e-7)
    optimizer, before = NegativeCurvature(model, lr=0.1), parameter_vector(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Hessian of _Middle is not finite, though"):
            optimizer.step(*batches[0])
    assert torch.equal(parameter_vector(model), before)


def test_a_backward_pass_with_another_derivative_at_zero():
    torch.manual_seed(0)
    model, x, y = Fn(lambda s, x: s.layer(x).logcumsumexp(1), layer=nn.Linear(4, 6)).double(), *minibatch(9)
    G = Objective(model, (x, y)).gauss_newton()
    v = torch.randn(30).double()
    jv, p = jacobian_product(model, x, v), model(x).detach().softmax(1)
    assert float(v @ (G @ v)) == pytest.approx(
        float((jv * (p * jv - p * (p * jv).sum(1, keepdim=True))).sum() / 9), rel=1e-6
    )
    torch.testing.assert_close(dense_matrix(G), dense_gauss_newton(model, [(x, y)], "cross_entropy"))


def _hooked(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = s.a(x)
        if h.requires_grad:
            h.register_hook(hook)
        return s.b(torch.tanh(h))

    return Fn(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()


NOT_LINEAR = {
    "normalised": lambda g: g / g.norm(),
    "clipped": lambda g: g.clamp(-0.1, 0.1),
    "root": lambda g: 2 * g.abs().sqrt(),
    "positive": lambda g: g.relu(),
    "size": lambda g: g.abs(),
}
LINEAR = {"same": lambda g: g, "reversed": lambda g: -g, "rolled": lambda g: g.roll(1, 0)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", [*NOT_LINEAR, *LINEAR])
def test_a_backward_pass_that_is_not_linear(name, together, seed):
    torch.manual_seed(seed)
    objective = Objective(_hooked((NOT_LINEAR | LINEAR)[name]), minibatch(9))
    V = torch.randn(objective.num_parameters, 3).double()

    def product() -> Tensor:
        G = objective.gauss_newton()
        G.vectors_at_once = together
        return G @ V

    if name in LINEAR:
        gram = V.T @ product()
        torch.testing.assert_close(gram, gram.T)
        return
    with pytest.raises(RuntimeError, match="the backward pass of Fn is not linear"):
        product()


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_curveball_refuses_a_backward_pass_that_is_not_linear(name):
    torch.manual_seed(0)
    model = _hooked(NOT_LINEAR[name])
    with pytest.raises(RuntimeError, match="the backward pass of Fn is not linear"):
        CurveBall(model).step(*minibatch(9))
