r"""Batch normalisation whose second derivatives are written out.

With statistics m and :math:`r = (v + \epsilon)^{-1/2}` of each channel, :math:`\hat x = r\,(x - m)` and
:math:`y = w\,\hat x + b`. For a cotangent g of y, with sums over the n entries of a channel,

.. math:: g_x = w\,r\,P g, \qquad g_w = \sum g\,\hat x, \qquad g_b = \sum g,

P = 1 for stored statistics, :math:`P u = u - \bar u - \hat x\,\overline{u \hat x}` (symmetric) for those of the batch.
The derivatives of :math:`\langle a, g_x\rangle + \langle c, g_w\rangle + \langle e, g_b\rangle` are for both

.. math:: \partial_g = w\,r\,P a + c\,\hat x + e, \qquad \partial_w = r \sum a\,P g,

and in x :math:`r\,c\,g` for stored statistics, where g_x does not depend on x, and for those of the batch, with
:math:`q = \overline{a\,P g}`, from :math:`\mathrm{d}\hat x = r\,P\,\mathrm{d}x` and
:math:`\mathrm{d}r = -r^2\,\overline{\hat x\,\mathrm{d}x}`,

.. math::
    \partial_x = r\,\bigl[(c - w r\,\overline{a \hat x})\,P g - w r\,\overline{g \hat x}\,P a - w r\,q\,\hat x\bigr].

Each of these is one or two calls of the kernels that training uses. torch's own formula makes a dozen passes over
tensors of the activations' size, and takes the batch's statistics for constants where it is differentiated once more.
A derivative that the model takes itself is therefore made of ordinary operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from curvspace.curvature.second_order import SecondOrderLayers

_forward = torch.ops.aten.native_batch_norm.default
_backward = torch.ops.aten.native_batch_norm_backward.default


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layers: SecondOrderLayers,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``, recorded by ``layers``.

    Mixed types, and what is an error, go to torch's own.
    """
    types = {t.dtype for t in (x, running_mean, running_var, weight, bias) if t is not None}
    stored = running_mean is not None and running_var is not None
    possible = x.numel() > x.shape[1] if training else stored
    if not possible or types not in ({torch.float32}, {torch.float64}):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    w = x.new_ones(x.shape[1]) if weight is None else weight
    b = torch.zeros_like(w) if bias is None else bias
    return _BatchNorm.apply(x, w, b, running_mean, running_var, training, momentum, eps, layers)


def plain_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``, by ordinary operations; running statistics are not written."""
    y, _ = _normalised(x, running_mean, running_var, training, eps)
    y = y if weight is None else y * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


def _plain_backward(
    g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x, g_w, g_b) by ordinary operations, to be differentiated in everything and as often as wanted."""
    normalised, r = _normalised(x, mean, var, training, eps)
    projected = g
    if training:
        along = _along(x)
        projected = g - g.mean(along, keepdim=True) - normalised * (g * normalised).mean(along, keepdim=True)
    return _per_channel(w, x) * r * projected, (g * normalised).sum(_along(x)), g.sum(_along(x))


def _normalised(
    x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised x, and r in a shape that multiplies it."""
    if training or mean is None or var is None:
        var, mean = torch.var_mean(x, _along(x), correction=0)
    r = (_per_channel(var, x) + eps).rsqrt()
    return (x - _per_channel(mean, x)) * r, r


def _along(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 2))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        layers: SecondOrderLayers,
    ) -> Tensor:
        y, m, r = _forward(x, w, b, mean, var, training, momentum, eps)
        if training:
            var = r.pow(-2) - eps  # exact to rounding relative to var + eps, which is all that enters
        else:
            assert mean is not None
            assert var is not None
            m, r = mean, (var + eps).rsqrt()
        ctx.save_for_backward(x, w, m, var, r)
        ctx.training, ctx.eps, ctx.layers = training, eps, layers
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, *statistics = ctx.saved_tensors
        if ctx.layers.recording and torch.is_grad_enabled():
            mean, var, _ = statistics
            return (*_plain_backward(g, x, w, mean, var, ctx.training, ctx.eps), *[None] * 6)
        if ctx.layers.linear:
            x, w = x.detach(), w.detach()
        found = _BatchNormBackward.apply(g, x, w, *statistics, ctx.training, ctx.eps)
        return (*found, *[None] * 6)


class _BatchNormBackward(torch.autograd.Function):
    """(g, x, w) -> (g_x, g_w, g_b), and its own backward pass; there is none of that one."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, m: Tensor, v: Tensor, r: Tensor, training: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _backward(g, x, w, m, v, m, r, training, eps, [True, True, True])
        ctx.save_for_backward(g, x, w, m, v, r, gw, gb)
        ctx.training, ctx.eps = training, eps
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, a: Tensor, c: Tensor, e: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a second derivative through batch normalisation cannot be differentiated once more; "
                "take objective.hessian_by_differences()"
            )
        g, x, w, m, v, r, sum_gx, sum_g = ctx.saved_tensors

        def normalised(scale: Tensor, shift: Tensor) -> Tensor:
            return _forward(x, scale, shift, m, v, False, 0.0, ctx.eps)[0]

        wrpa, sum_ax, sum_a = _backward(a, x, w, m, v, m, r, ctx.training, ctx.eps, [True, True, True])
        dg = normalised(c, e).add_(wrpa)
        if not any(ctx.needs_input_grad[1:3]):
            return (dg, *[None] * 7)
        if not ctx.training:
            zero = torch.zeros_like(m)  # w r a g and c r g, from the kernel with r a in the place of the normalised x
            dx, dw, _ = _backward(g, a, c, zero, v, zero, r, False, ctx.eps, [True, True, False])
            return (dg, dx, dw, *[None] * 5)
        n = x.numel() // x.shape[1]
        q = ((a * g).sum(_along(x)) - (sum_a * sum_g + sum_ax * sum_gx) / n) / n
        of_g, of_a = r * (c - w * r * sum_ax / n), -w * r * r * sum_gx / n
        shift = -(of_g * sum_g + of_a * sum_a) / n
        scale = -w * r * r * q - (of_g * sum_gx + of_a * sum_ax) / n
        dx = normalised(scale, shift)
        dx.addcmul_(g, _per_channel(of_g, x)).addcmul_(a, _per_channel(of_a, x))
        return (dg, dx, n * r * q, *[None] * 5)
