"""The Gram matrix of the Gauss-Newton matrix, and projections of the latter, against the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvspace import Objective
from curvspace.curvature import dense_matrix, gram_eigh, projected_gauss_newton
from tests.unit.small_networks import minibatch, mlp


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gram_matrix_gives_the_spectrum_of_gauss_newton(loss):
    model, (x, y) = mlp(), minibatch(7)
    targets = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    G = Objective(model, [(x[:4], targets[:4]), (x[4:], targets[4:])], loss).gauss_newton()
    values, vectors = gram_eigh(G)
    dense = dense_matrix(G)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=1e-12)
    assert expected[len(values)] < 1e-10
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-12)


def test_projected_gauss_newton():
    model, (x, y) = mlp(), minibatch()
    Q = torch.randn(sum(p.numel() for p in model.parameters()), 4).double()
    expected = Q.T @ dense_matrix(Objective(model, [(x, y)]).gauss_newton()) @ Q
    torch.testing.assert_close(projected_gauss_newton(model, x, y, "cross_entropy", Q), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "empirical_fisher"])
def test_the_gram_matrix_is_of_gauss_newton(name):
    with pytest.raises(ValueError, match="needs a Gauss-Newton matrix"):
        gram_eigh(getattr(Objective(mlp(), [minibatch()]), name)())


def test_the_gram_matrix_of_zero():
    with pytest.warns(RuntimeWarning, match="linear in the outputs"):
        values, vectors = gram_eigh(
            Objective(nn.Sequential(mlp(), nn.LogSoftmax(1)), [minibatch()], "nll_loss").gauss_newton()
        )
    assert values.shape == (0,)
    assert vectors.shape == (43, 0)
