r"""Curvature restricted to a subspace, :math:`Q^\top G Q = (JQ)^\top \nabla_z^2\ell\,(JQ)`: no (P, P) matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.arithmetic import own_arithmetic
from curvspace.batches import batch_size
from curvspace.curvature.frozen import BatchNorm, FrozenModel
from curvspace.curvature.linearisation import Batch, GaussNewtonLinearisation, JacobianLinearisation, Point
from curvspace.functional import flatten, unflatten
from curvspace.inputs import Inputs
from curvspace.losses import Loss, get_loss
from curvspace.outputs import logits
from curvspace.tensors import ordinary
from curvspace.threads import one_at_a_time


@one_at_a_time
@torch.inference_mode(False)
def jacobian_products(model: nn.Module, x: Inputs, Q: Tensor, *, batch_norm: BatchNorm = None) -> tuple[Tensor, Tensor]:
    """Outputs z (N, ...) and their derivatives J Q along the k columns of Q (P, k), stacked first: (k, N, ...)."""
    function = FrozenModel(model, batch_norm)
    theta, constants = function.parameters(), function.constants()
    with own_arithmetic(function.device):
        jacobian = JacobianLinearisation(function, theta, lambda: logits(function(theta, constants, function.cast(x))))
        products = [jacobian.forward(unflatten(q, theta)) for q in _rows(function, Q)]
    return jacobian.z.detach(), torch.stack(products)


@one_at_a_time
@torch.inference_mode(False)
def projected_gauss_newton(
    model: nn.Module,
    x: Inputs,
    y: Any,
    loss: str | Loss | Callable[[Any, Any], Tensor],
    Q: Tensor,
    *,
    batch_norm: BatchNorm = None,
) -> Tensor:
    """The Gauss-Newton matrix of one batch in the span of Q (P, k): a symmetric (k, k) float64 matrix.

    The model is evaluated in its present mode (``batch_norm=None``), without dropout, and its running statistics stay.
    """
    point = Point.here(FrozenModel(model, batch_norm), get_loss(loss))
    batch = Batch(x, y, 1.0, 0, batch_size(y), ())
    columns = [unflatten(q, point.parameters) for q in _rows(point.function, Q)]
    with own_arithmetic(point.function.device):
        linearisation = GaussNewtonLinearisation(point, batch, diverged=True)
        jq = [linearisation.jacobian.forward(q) for q in columns]
        pairs = [linearisation.curvature.product(u, q) for u, q in zip(jq, columns, strict=True)]
    small = _products(jq, [hu for hu, _ in pairs])
    read = linearisation.curvature.read
    if read:
        small += _products([flatten(q[i] for i in read) for q in columns], [flatten(own) for _, own in pairs])
    return (small + small.T) / 2


def _rows(function: FrozenModel, Q: Tensor) -> Tensor:
    return ordinary(Q.detach().to(function.device, function.dtype).T.contiguous())


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """All inner products, (k, k) in float64."""
    return torch.stack(left).flatten(1).double() @ torch.stack(right).flatten(1).double().T
