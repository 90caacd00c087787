r"""Curvature restricted to a subspace, :math:`Q^\top G Q = (JQ)^\top \nabla_z^2\ell\,(JQ)`: no (P, P) matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from curvspace.curvature.frozen import FrozenModel, State
from curvspace.curvature.linearisation import JacobianLinearisation
from curvspace.functional import Inputs, unflatten
from curvspace.losses import Loss, get_loss


def jacobian_products(model: nn.Module, x: Inputs, Q: Tensor, *, state: State = None) -> tuple[Tensor, Tensor]:
    """Outputs z (N, ...) and their derivatives J Q along the k columns of Q (P, k), stacked first: (k, N, ...)."""
    function = FrozenModel(model, state)
    theta, constants = function.parameters(), function.constants()
    jacobian = JacobianLinearisation(theta, lambda: function(theta, constants, function.cast(x)))
    columns = Q.detach().to(function.device, function.dtype).T.contiguous()
    return jacobian.z.detach(), torch.stack([jacobian.forward(unflatten(q, theta)) for q in columns])


def projected_gauss_newton(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor],
    Q: Tensor,
    *,
    state: State = None,
) -> Tensor:
    """The Gauss-Newton matrix of one batch in the span of Q (P, k): a symmetric (k, k) float64 matrix.

    The model is evaluated in its present mode (``state=None``), without dropout, and its running statistics stay.
    """
    loss = get_loss(loss)
    z, jq = jacobian_products(model, x, Q, state=state)
    y = y.to(z.device, z.dtype if y.is_floating_point() else y.dtype)
    hjq = torch.stack([loss.hessian_product(z, y, u) for u in jq])
    small = jq.flatten(1).double() @ hjq.flatten(1).double().T
    return (small + small.T) / 2
