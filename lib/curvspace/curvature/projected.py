r"""Curvature restricted to a subspace: :math:`Q^\top G Q = (JQ)^\top \nabla_z^2\ell\,(JQ)`, without any (P, P) matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from curvspace.curvature.frozen import FrozenModel, State
from curvspace.functional import Inputs, unflatten
from curvspace.losses import Loss, get_loss


def jacobian_products(
    model: nn.Module, x: Inputs, Q: Tensor, *, state: State = None
) -> tuple[Tensor, Tensor]:
    """Outputs z (N, ...) and their derivatives J Q along the k columns of Q (P, k), stacked first: (k, N, ...)."""
    function = FrozenModel(model, state)
    theta, constants = function.parameters(), function.constants()
    with torch.enable_grad():
        z = function(theta, constants, function.cast(x))
        u = torch.zeros_like(z, requires_grad=True)
        vjp = torch.autograd.grad(z, theta, u, create_graph=True, materialize_grads=True)
    live = [i for i, w in enumerate(vjp) if w.requires_grad]
    rows = []
    for column in Q.detach().to(function.device, function.dtype).T:
        v = unflatten(column.contiguous(), theta)
        rows += torch.autograd.grad([vjp[i] for i in live], u, [v[i] for i in live], retain_graph=True)
    return z.detach(), torch.stack(rows)


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
