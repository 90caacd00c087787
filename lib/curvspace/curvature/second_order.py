r"""Layers whose second derivatives are right, and as fast as the first: convolutions and normalisation.

A convolution :math:`x * w` is bilinear, so the derivatives of its backward pass are again convolutions of the three
kinds that training uses (forward, gradient in the input, gradient in the weight). torch computes them by a generic
route (transposed, group by group) that took 1.7 times as long for the Hessian product of a small network on a CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from curvspace.curvature.batch_norm import batch_norm, plain_batch_norm

_forward = torch.ops.aten.convolution.default
_backward = torch.ops.aten.convolution_backward.default


class _Geometry(NamedTuple):
    """The arguments of a convolution after input, weight and bias, in the order of the kernels."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class _Convolution(torch.autograd.Function):
    """x * w + b, recorded by ``layers``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry, layers: SecondOrderLayers
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.layers = geometry, layers
        return _forward(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            if ctx.layers.linear:
                x, w = x.detach(), w.detach()
            gx, gw = _ConvolutionBackward.apply(grad, x, w, ctx.geometry, needs_x, needs_w)
        else:
            gx, gw, _ = _backward(grad, x, w, None, *ctx.geometry, [needs_x, needs_w, False])
        gb = grad.sum([0, *range(2, grad.ndim)]) if needs_b else None
        return gx, gw, gb, None, None


class _ConvolutionBackward(torch.autograd.Function):
    """(cotangent, x, w) -> (gradient in x, gradient in w), and its own backward pass."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        gx, gw, _ = _backward(grad, x, w, None, *geometry, [needs_x, needs_w, False])
        return gx, gw

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None, ggw: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        grad, x, w = ctx.saved_tensors
        needs_grad, needs_x, needs_w = ctx.needs_input_grad[:3]
        parts = []
        if needs_grad and ggx is not None:
            parts.append(_forward(ggx, w, None, *ctx.geometry))
        if needs_grad and ggw is not None:
            parts.append(_forward(x, ggw, None, *ctx.geometry))
        dgrad = parts[0] + parts[1] if len(parts) == 2 else (parts[0] if parts else None)
        dx = dw = None
        if needs_x and ggw is not None:
            dx = _backward(grad, x, ggw, None, *ctx.geometry, [True, False, False])[0]
        if needs_w and ggx is not None:
            dw = _backward(grad, ggx, w, None, *ctx.geometry, [False, True, False])[1]
        return dgrad, dx, dw, None, None, None


class _LayerNorm(torch.autograd.Function):
    """torch's kernels; a derivative that the model takes itself is made of ordinary operations, because torch's second
    derivative takes mean and variance for constants where it is differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float, layers: SecondOrderLayers
    ) -> Tensor:
        y, mean, r = torch.ops.aten.native_layer_norm.default(x, shape, w, b, eps)
        ctx.save_for_backward(x, w, b, mean, r)
        ctx.shape, ctx.eps, ctx.layers = shape, eps, layers
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, b, mean, r = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if ctx.layers.recording and torch.is_grad_enabled():
            of = [t for t, needs in zip((x, w, b), needed, strict=True) if needs]
            y = _plain_layer_norm(x, ctx.shape, w, b, ctx.eps)
            found = iter(torch.autograd.grad(y, of, g, create_graph=True))
            gx, gw, gb = (next(found) if needs else None for needs in needed)
        else:
            if ctx.layers.linear:
                x, w = x.detach(), None if w is None else w.detach()
            backward = torch.ops.aten.native_layer_norm_backward.default
            gx, gw, gb = backward(g, x, ctx.shape, mean, r, w, b, needed)
        return gx, None, gw, gb, None, None


def _plain_layer_norm(x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    var, mean = torch.var_mean(x, list(range(x.ndim - len(shape), x.ndim)), correction=0, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def _layer_norm(
    layers: SecondOrderLayers,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if {t.dtype for t in (input, weight, bias) if t is not None} not in ({torch.float32}, {torch.float64}):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if _transformed():
        return _plain_layer_norm(input, list(normalized_shape), weight, bias, eps)
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps, layers)


def _as_list(value: int | tuple[int, ...], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry]:
    dims = weight.ndim - 2
    stride, padding, dilation = (_as_list(v, dims) for v in (stride, padding, dilation))
    return input, weight, bias, _Geometry(stride, padding, dilation, False, [0] * dims, groups)


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry]:
    dims = weight.ndim - 2
    stride, padding, dilation = (_as_list(v, dims) for v in (stride, padding, dilation))
    return input, weight, bias, _Geometry(stride, padding, dilation, True, _as_list(output_padding, dims), groups)


_PARSERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed,
    torch.conv_transpose2d: _transposed,
    torch.conv_transpose3d: _transposed,
}


class SecondOrderLayers(TorchFunctionMode):
    """While active, convolutions are recorded with the derivatives above, batch normalisation with those of
    :mod:`~curvspace.curvature.batch_norm`, layer normalisation so that the model may differentiate it too, and weight
    normalisation by its formula :math:`w = v\\,g/|v|`: the second derivative of torch's fused one takes the norms for
    constants.

    Parameters
    ----------
    linear
        Promise that backward passes after this block are differentiated only in their cotangent (as for J v): then
        nothing else is computed.

    Attributes
    ----------
    recording : whether the block lasts, so that a backward pass is a derivative that the model takes itself
    """

    def __init__(self, linear: bool = False):
        super().__init__()
        self.recording = True
        self._linear = linear

    @property
    def linear(self) -> bool:
        """Whether a backward pass that runs now will be differentiated in the cotangent alone."""
        return self._linear and not self.recording

    def __exit__(self, *error: Any) -> None:
        self.recording = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PARSERS and not _transformed():
            bound = inspect.signature(_PARSERS[func]).bind(*args, **kwargs).arguments
            x = bound["input"]
            unusual = isinstance(bound.get("padding"), str) or x.ndim != bound["weight"].ndim
            if not unusual and not torch.is_autocast_enabled(x.device.type):  # a backward pass needs one type
                return _Convolution.apply(*_PARSERS[func](**bound), self)
        if func is F.batch_norm:
            return plain_batch_norm(*args, **kwargs) if _transformed() else batch_norm(*args, **kwargs, layers=self)
        if func is F.layer_norm:
            return _layer_norm(self, *args, **kwargs)
        if func in (torch._weight_norm, torch._weight_norm_interface):
            w, norm = _weight_norm(*args, **kwargs)
            return w if func is torch._weight_norm else (w, norm)
        return func(*args, **kwargs)


def _transformed() -> bool:
    """Whether the model computes under ``torch.func`` or with dual numbers, which need torch's own layers."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm), norm
