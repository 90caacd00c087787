"""Products with the Hessian and the Gauss-Newton matrix against dense matrices from plain double backward."""

from __future__ import annotations

import pytest
import torch

from curvspace import Objective
from tests.unit.architectures import CASES, Case
from tests.unit.oracles import central_difference, dense_gauss_newton, dense_hessian, total_loss

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
    torch.testing.assert_close(H @ _identity(H.shape[0]), dense_hessian(model, batches, case.loss), rtol=0, atol=1e-10)
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
