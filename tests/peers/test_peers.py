"""Cross-checks against other libraries, where they are right: networks without normalisation layers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective, eigsh
from curvspace.curvature import dense_matrix, hutchpp

pytestmark = pytest.mark.peers


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()
    batches = [(torch.randn(n, 1, 8, 8).double(), torch.randint(4, (n,))) for n in (9, 4)]
    return model, batches, Objective(model, batches)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_curvlinops(problem, kind):
    curvlinops = pytest.importorskip("curvlinops")
    model, batches, objective = problem
    theirs = {"hessian": curvlinops.HessianLinearOperator, "gauss_newton": curvlinops.GGNLinearOperator}[kind]
    operator = theirs(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    V = torch.randn(objective.num_parameters, 3, dtype=torch.float64)
    torch.testing.assert_close(getattr(objective, kind)() @ V, operator @ V, rtol=0, atol=1e-12)


def test_hessian_eigenthings(problem):
    package = pytest.importorskip("hessian_eigenthings")
    model, batches, objective = problem
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    operator = package.HessianOperator(model, whole, package.supervised_loss(F.cross_entropy))
    found = package.lanczos(operator, k=3, which="LA", max_iter=60, tol=1e-9, reorthogonalize=True, seed=0)
    pairs = eigsh(objective.hessian(), 3, tol=1e-9)
    torch.testing.assert_close(pairs.values, found.eigenvalues, rtol=1e-8, atol=1e-10)


def test_pyhessian(problem):
    package = pytest.importorskip("pyhessian")
    model, batches, objective = problem
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    theirs = package.hessian(model, nn.CrossEntropyLoss(), data=whole, cuda=False)
    module = sys.modules["pyhessian.hessian"]
    assert module.hessian_vector_product is not None
    pairs = eigsh(objective.hessian(), 1, "LM", tol=1e-6)
    v = pairs.vectors[:, 0]
    views = [
        part.view_as(p) for part, p in zip(v.split([p.numel() for p in theirs.params]), theirs.params, strict=True)
    ]
    product = torch.cat([t.reshape(-1) for t in module.hessian_vector_product(theirs.gradsH, theirs.params, views)])
    torch.testing.assert_close(product, pairs.values[0] * v, rtol=0, atol=1e-5)


def test_arpack(problem):
    from scipy.sparse.linalg import eigsh as arpack

    H = problem[2].hessian()
    for which in ("LA", "SA", "BE", "LM"):
        theirs = np.sort(arpack(H.to_scipy(), k=4, which=which, return_eigenvectors=False))
        np.testing.assert_allclose(np.sort(eigsh(H, 4, which, tol=1e-9).values.numpy()), theirs, atol=1e-10)


def test_trace_and_dense(problem):
    H = problem[2].hessian()
    exact = float(dense_matrix(H).trace())
    found = hutchpp(H, 3 * H.shape[0])
    assert found.value == pytest.approx(exact, abs=1e-10)
