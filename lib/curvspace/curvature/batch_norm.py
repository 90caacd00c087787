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
tensors of the activations' size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    linear: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``.

    ``linear``: its backward pass will be differentiated in the cotangent alone. Mixed types, and what is an
    error, go to torch's own.
    """
    types = {t.dtype for t in (x, running_mean, running_var, weight, bias) if t is not None}
    stored = running_mean is not None and running_var is not None
    possible = x.numel() > x.shape[1] if training else stored
    if not possible or types not in ({torch.float32}, {torch.float64}):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    w = x.new_ones(x.shape[1]) if weight is None else weight
    b = torch.zeros_like(w) if bias is None else bias
    return _BatchNorm.apply(x, w, b, running_mean, running_var, training, momentum, eps, linear)


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
        linear: bool,
    ) -> Tensor:
        y, m, r = _forward(x, w, b, mean, var, training, momentum, eps)
        if training:
            var = r.pow(-2) - eps  # exact to rounding relative to var + eps, which is all that enters
        else:
            assert mean is not None
            assert var is not None
            m, r = mean, (var + eps).rsqrt()
        ctx.save_for_backward(x, w, m, var, r)
        ctx.training, ctx.eps, ctx.linear = training, eps, linear
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, *statistics = ctx.saved_tensors
        if ctx.linear:
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
            raise RuntimeError("a second derivative through batch normalisation cannot be differentiated once more")
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
        along = [0, *range(2, x.ndim)]
        q = ((a * g).sum(along) - (sum_a * sum_g + sum_ax * sum_gx) / n) / n
        of_g, of_a = r * (c - w * r * sum_ax / n), -w * r * r * sum_gx / n
        shift = -(of_g * sum_g + of_a * sum_a) / n
        scale = -w * r * r * q - (of_g * sum_gx + of_a * sum_ax) / n
        dx = normalised(scale, shift)
        per_channel = (-1, *[1] * (x.ndim - 2))
        dx.addcmul_(g, of_g.view(per_channel)).addcmul_(a, of_a.view(per_channel))
        return (dg, dx, n * r * q, *[None] * 5)
