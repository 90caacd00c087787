"""Outputs of every form: packed, cut with the batch, watched for random draws."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace import Objective
from tests.unit.small_networks import Fn

N = 24


@dataclasses.dataclass
class Named:
    mean: Tensor
    scale: Tensor
    ids: Tensor


def _model(f, **parts) -> nn.Module:
    torch.manual_seed(0)
    return Fn(f, a=nn.Linear(4, 3), b=nn.Linear(4, 3), **parts).double()


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 4).double(), torch.randn(N, 3).double()


def _gaussian(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(mean, y, F.softplus(scale))


# The same function with outputs of some form, and with the real numbers in them in one tensor
FORMS = {
    "tuple": (lambda s, x: (s.a(x), s.b(x)), lambda z, y: _gaussian(*z, y)),
    "mapping": (lambda s, x: {"m": s.a(x), "s": s.b(x)}, lambda z, y: _gaussian(z["m"], z["s"], y)),
    "dataclass": (lambda s, x: Named(s.a(x), s.b(x), torch.arange(len(x))), lambda z, y: _gaussian(z.mean, z.scale, y)),
    "complex": (lambda s, x: torch.complex(s.a(x), s.b(x)), lambda z, y: _gaussian(z.real, z.imag, y)),
    "complex beside real": (
        lambda s, x: (s.a(x)[:, :1], torch.complex(s.a(x)[:, 1:], s.b(x)[:, 1:]), s.b(x)[:, :1]),
        lambda z, y: _gaussian(torch.cat([z[0], z[1].real], 1), torch.cat([z[2], z[1].imag], 1), y),
    ),
}


@pytest.mark.parametrize("microbatch", [None, 7])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_outputs(name, microbatch):
    (f, loss), (x, y) = FORMS[name], _data()
    objective = Objective(_model(f), (x, y), loss, microbatch=microbatch)
    plain = Objective(
        _model(lambda s, x: torch.cat([s.a(x), s.b(x)], 1)), (x, y), lambda z, y: _gaussian(*z.chunk(2, 1), y)
    )
    assert [b.size for b in objective.batches] == ([N] if microbatch is None else [7, 7, 7, 3])
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(2)).double()
    assert objective.loss() == pytest.approx(plain.loss(), rel=1e-12)
    torch.testing.assert_close(objective.gradient(), plain.gradient())
    for matrix in ("hessian", "gauss_newton"):
        torch.testing.assert_close(getattr(objective, matrix)() @ v, getattr(plain, matrix)() @ v)
    with pytest.raises(ValueError, match="outputs in one tensor"):
        objective.empirical_fisher()


@pytest.mark.parametrize(
    "loss",
    [lambda z, y: _gaussian(*z, y) + (z[0].mean() - z[1].mean()) ** 2, lambda z, y: _gaussian(*z, y) * len(y)],
    ids=["joins examples", "a sum"],
)
def test_outputs_in_a_tuple_whose_loss_is_no_mean_of_parts(loss):
    objective = Objective(_model(lambda s, x: (s.a(x), s.b(x))), _data(), loss, microbatch=7)
    with pytest.raises(ValueError, match="would change the function"):
        objective.loss()


def test_examples_that_act_on_each_other_in_a_complex_output_alone():
    def f(s, x):
        z = torch.complex(s.a(x), s.b(x))
        return s.a(x), z * z.mean(0)

    objective = Objective(_model(f), _data(), lambda z, y: (z[0] + z[1].abs() - y).square().mean(), microbatch=7)
    with pytest.raises(ValueError, match="would change the function"):
        objective.loss()


DRAWS = {
    "classes": lambda s, x: (s.a(x), s.a(x).softmax(1).multinomial(1)[:, 0]),
    "a mask": lambda s, x: (s.a(x), torch.rand(len(x)) < 0.5),
    "complex": lambda s, x: (s.a(x), torch.randn(len(x), dtype=torch.complex128)),
    "a choice of rows": lambda s, x: (s.a(x), torch.arange(len(x))[torch.rand(len(x)) < 0.5]),
    "an object": lambda s, x: SimpleNamespace(z=s.a(x) + torch.randn(3)),
    "a distribution": lambda s, x: torch.distributions.Normal(s.a(x) + torch.randn(3), 1.0),
}


def _of_any(z, y: Tensor) -> Tensor:
    if isinstance(z, SimpleNamespace):
        return F.mse_loss(z.z, y)
    if isinstance(z, torch.distributions.Normal):
        return -z.log_prob(y).mean()
    rows = z[1].long() if z[1].dtype != torch.int64 and not z[1].is_complex() else z[1]
    return F.mse_loss(z[0], y) + (rows.abs().sum() * z[0].square()).mean()


@pytest.mark.parametrize("matrix", ["hessian", "hessian_by_differences"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_show_in_outputs_of_any_form(name, matrix):
    with pytest.raises(RuntimeError, match="Fn is not deterministic"):
        getattr(Objective(_model(DRAWS[name]), _data(), _of_any), matrix)()


def test_outputs_of_a_form_that_only_the_loss_knows():
    model, (x, y) = _model(lambda s, x: torch.distributions.Normal(s.a(x), F.softplus(s.b(x)))), _data()
    objective = Objective(model, (x, y), lambda d, y: -d.log_prob(y).mean())
    same = Objective(
        _model(FORMS["tuple"][0]), (x, y), lambda z, y: F.gaussian_nll_loss(z[0], y, F.softplus(z[1]) ** 2)
    )
    v = torch.ones(objective.num_parameters).double()
    torch.testing.assert_close(objective.hessian() @ v, same.hessian() @ v)
    with pytest.raises(ValueError, match="no floating-point tensor is found in the model's outputs, a Normal"):
        objective.gauss_newton() @ v


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_complex_weight_kept_as_pairs_of_real_numbers(before, at_once):
    """As the error for complex parameters advises; at an odd place in the vector of parameters, too."""
    x, y = _data()

    def f(s, x):
        return torch.fft.irfft(torch.fft.rfft(s.a(x)) * torch.view_as_complex(s.w), n=3).tanh()

    def by_pairs(s, x):
        z, (re, im) = torch.fft.rfft(s.a(x)), s.w.unbind(-1)
        return torch.fft.irfft(torch.complex(z.real * re - z.imag * im, z.real * im + z.imag * re), n=3).tanh()

    parts = {"odd": nn.Parameter(torch.zeros(before)), "w": nn.Parameter(torch.tensor([[1.0, 0.5], [0.3, -2.0]]))}
    models = [_model(g, **parts) for g in (f, by_pairs)]
    V = torch.randn(before + 4 + 30, 3, generator=torch.Generator().manual_seed(2)).double()
    for matrix in ("hessian", "gauss_newton"):
        found, expected = (getattr(Objective(m, (x, y), "mse"), matrix)() for m in models)
        found.vectors_at_once = at_once
        torch.testing.assert_close(found @ V, expected @ V)
