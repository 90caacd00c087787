"""Derivatives of the losses in the outputs, against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from curvspace.losses import CrossEntropy, Loss, SquaredError, get_loss


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (CrossEntropy(), (5, 3)),
        (CrossEntropy(), (5, 3, 2)),
        (CrossEntropy(label_smoothing=0.1), (5, 3)),
        (SquaredError(), (5, 3)),
        (SquaredError(), (5, 3, 2)),
        (Loss(lambda z, y: (z.square().sum(1) ** 1.5).mean()), (5, 3)),
        (Loss(lambda z, y: z.sum(1).mean()), (5, 3)),
    ],
)
def test_gradient_and_hessian_product(loss, shape):
    torch.manual_seed(0)
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u = torch.randn(shape, dtype=torch.float64)
    y = torch.randn(shape).double() if isinstance(loss, SquaredError) else torch.randint(3, (5, *shape[2:]))
    (gradient,) = torch.autograd.grad(loss(z, y), z, create_graph=True)
    torch.testing.assert_close(loss.gradient(z.detach(), y), gradient.detach())
    product = torch.zeros_like(u)
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, z, u)
    torch.testing.assert_close(loss.hessian_product(z.detach(), y, u), product)


def test_normalisation_of_the_squared_error():
    z, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert float(SquaredError()(z, y)) == 0.5 * 5 / 2


def test_names_and_callables():
    assert get_loss("cross_entropy").name == "cross_entropy"
    assert get_loss("mse").name == "mse"
    assert get_loss(F.mse_loss).name == "mse_loss"
    loss = CrossEntropy()
    assert get_loss(loss) is loss
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        get_loss("hinge")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        CrossEntropy(1.5)
