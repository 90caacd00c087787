"""Products with the Hessian and the Gauss-Newton matrix against dense matrices from plain double backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from curvspace import Objective
from curvspace.curvature import eigsh
from tests.unit.architectures import CASES, Case
from tests.unit.backward_passes import by_hand
from tests.unit.oracles import central_difference, dense_gauss_newton, dense_hessian, total_loss
from tests.unit.small_networks import Fn, minibatch, mlp

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _objective(case: Case, **options):
    model, batches = case.make()
    model.train(case.batch_norm == "batch")
    return model, batches, Objective(model, batches, case.loss, batch_norm=case.batch_norm, **options)


def _identity(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@cases
def test_hessian_is_the_dense_one(case):
    model, batches, objective = _objective(case)
    H = objective.hessian()
    found = H @ _identity(H.shape[0])
    torch.testing.assert_close(found, dense_hessian(model, batches, case.loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)  # torch.func.hessian's is not, through normalisation
    assert H.products == H.shape[0]


@cases
def test_gauss_newton_is_the_dense_one(case):
    model, batches, objective = _objective(case)
    G = objective.gauss_newton()
    dense = dense_gauss_newton(model, batches, case.loss)
    torch.testing.assert_close(G @ _identity(G.shape[0]), dense, rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12


@cases
def test_hessian_product_agrees_with_central_differences(case):
    model, batches, objective = _objective(case)
    H = objective.hessian()
    v = torch.randn(H.shape[0], dtype=torch.float64)
    v /= v.norm()
    torch.testing.assert_close(H @ v, central_difference(model, batches, case.loss, v), rtol=0, atol=1e-8)


@cases
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_engines_and_vector_batches_agree(case, kind):
    _, _, objective = _objective(case, engine="linearize")
    recompute = getattr(_objective(case, engine="recompute")[2], kind)()
    A = getattr(objective, kind)()
    V = torch.randn(A.shape[0], 3, dtype=torch.float64)
    expected = torch.stack([A @ v for v in V.T], dim=1)
    A.vectors_at_once = 2  # batched derivatives; falls back to the loop for layers without them
    torch.testing.assert_close(A @ V, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(recompute @ V, expected, rtol=0, atol=1e-11)
    assert not recompute._kept
    assert A._kept


@cases
def test_loss_and_gradient(case):
    model, batches, objective = _objective(case)
    value = total_loss(model, batches, case.loss)
    gradient = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    assert objective.loss() == pytest.approx(value.item(), abs=1e-12)
    expected = torch.cat([g.reshape(-1) for g in gradient])
    torch.testing.assert_close(objective.gradient(), expected, rtol=0, atol=1e-12)


def _asking(g, x):
    """Asks for a number, which derivatives of several vectors at once do not have."""
    return g * x.exp() if float(g.detach().abs().sum()) < 1e9 else g


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_the_loop_takes_over_for_all_vectors_that_are_left(kind):
    torch.manual_seed(0)
    function = by_hand(torch.exp, _asking)
    model = Fn(lambda s, x: s.b(function(s.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()
    operator = getattr(Objective(model, [minibatch(7), minibatch(5)]), kind)()
    V = torch.randn(operator.shape[0], 11).double()
    expected = operator @ V
    operator.vectors_at_once = 4
    torch.testing.assert_close(operator @ V, expected, rtol=0, atol=1e-12)
    assert operator.vectors_at_once == 1, "torch can batch this by now: take another example"


def test_the_fused_kernel_of_attention_has_no_second_derivative():
    """The case "fused-attention" has one all the same."""
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    fused = F.scaled_dot_product_attention(q, q, q).square().sum()
    (g,) = torch.autograd.grad(fused, q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.sum(), q)


def test_an_operator_as_one_of_scipy():
    H = Objective(mlp(), [minibatch()]).hessian()
    values = scipy_eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(values), eigsh(H, 3, tol=1e-9).values.flip(0), atol=1e-9)
    assert H.to_scipy().dtype == np.float64
    assert H.to_scipy().matmat(np.ones((H.shape[0], 2))).shape == (H.shape[0], 2)
