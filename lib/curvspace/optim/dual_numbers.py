"""Dual numbers through the layers that cost most, without the waste.

Plain ones waste time in three places, all of them in convolutions, linear layers, normalisation and max-pooling, which
:class:`SharedPrimal` takes over:

1. an input without a tangent (the data) is treated as a tensor of zeros and convolved all the same;
2. the operations on tangents are recorded for a backward pass that never comes;
3. another direction at the same point computes the primal outputs again, though parameters and data are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BILINEAR: frozenset[Callable[..., Any]] = frozenset(
    {torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.conv_transpose1d, torch.conv_transpose2d}
)
"""Functions (input, weight, bias, ...) linear in the input, in the weight and in the bias."""

_MAX_POOL: dict[Callable[..., Any], int] = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}
"""With the number of spatial dimensions."""


class SharedPrimal(TorchFunctionMode):
    """Dual-number rules for the costly layers, with their primal results kept from one pass to the next.

    The n-th such call of a replay is the n-th call of the recording, because the model is called with the same
    parameters, inputs, buffers and random draws. Should a call not match (another function, weight or shape), or
    its result have been changed in place since, it is computed afresh.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[object, int, tuple[Tensor, ...]]] = []
        self._position = 0
        self._recording = True

    def replay(self) -> None:
        """From here on, use the kept results in the order in which they were made."""
        self._recording = False
        self._position = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BILINEAR and len(args) >= 2:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            others = {name: value for name, value in kwargs.items() if name != "bias"}
            return self._bilinear(lambda x, w, b: func(x, w, b, *args[3:], **others), func, args[0], args[1], bias)
        if func is F.relu and not kwargs.get("inplace", False) and len(args) == 1:
            return self._relu(args[0])
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _MAX_POOL and args and not kwargs.get("return_indices", False):
            options = {**kwargs, "return_indices": True}
            return self._max_pool(lambda x: func(x, *args[1:], **options), args[0], _MAX_POOL[func])
        return func(*args, **kwargs)

    def _primal(self, key: object, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if self._recording:
            result = compute()
            self._kept.append((key, result[0]._version, tuple(t.detach() for t in result)))
            return result
        self._position += 1
        if self._position <= len(self._kept):
            recorded, version, kept = self._kept[self._position - 1]
            if recorded == key and kept[0]._version == version:
                return kept
        return compute()

    def _bilinear(
        self, apply: Callable[..., Tensor], name: object, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """dy = apply(dx, w) + apply(x, dw, db)."""
        (x, dx), (w, dw) = unpack_dual(inputs), unpack_dual(weight)
        b, db = (None, None) if bias is None else unpack_dual(bias)
        (y,) = self._primal((name, x.shape, w.data_ptr()), lambda: (apply(x, w, b),))
        if dx is None and dw is None and db is None:
            return y
        with torch.no_grad():
            if dx is None:
                dy = apply(x, torch.zeros_like(w) if dw is None else dw, db)
            elif dw is None:
                dy = apply(dx, w, db)
            else:
                dy = apply(x, dw, db).add_(apply(dx, w, None))
        return forward_ad.make_dual(y, dy)

    def _max_pool(self, apply: Callable[[Tensor], tuple[Tensor, ...]], inputs: Tensor, spatial: int) -> Tensor:
        """dy = dx at the positions of the maxima."""
        x, dx = unpack_dual(inputs)
        y, index = self._primal(("max_pool", x.shape), lambda: apply(x))
        if dx is None:
            return y
        with torch.no_grad():
            flat, positions = dx.flatten(-spatial), index.flatten(-spatial)
            if spatial == 2 and not y.is_contiguous():  # channels last: keep the layout, gather rows of channels
                dy = flat.transpose(1, 2).gather(1, positions.transpose(1, 2)).transpose(1, 2).view(y.shape)
            else:
                dy = flat.gather(-1, positions).view(y.shape)
        return forward_ad.make_dual(y, dy)

    def _relu(self, inputs: Tensor) -> Tensor:
        """dy = dx where y > 0."""
        x, dx = unpack_dual(inputs)
        (y,) = self._primal(("relu", x.shape), lambda: (F.relu(x),))
        if dx is None:
            return y
        with torch.no_grad():
            dy = torch.ops.aten.threshold_backward(dx, y, 0)
        return forward_ad.make_dual(y, dy)

    def _batch_norm(
        self,
        inputs: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        r"""y = w x̂ + b with x̂ = s (x - m), through the batch's own m and s in train mode:
        dy = w s (dx - mean(dx) - x̂ mean(x̂ dx)) + dw x̂ + db.

        The first term is a symmetric map, and therefore the one that a backward pass applies.
        """
        (x, dx), (w, dw), (b, db) = unpack_dual(inputs), unpack_dual(weight), unpack_dual(bias)
        if training and x.numel() == x.shape[1]:  # torch's own check, which its native function leaves out
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        moments = (running_mean, running_var)
        y, mean, scale = self._primal(
            ("batch_norm", x.shape, None if w is None else w.data_ptr()),
            lambda: torch.native_batch_norm(x, w, b, *moments, training, momentum, eps),
        )
        if dx is None and dw is None and db is None:
            return y
        with torch.no_grad():
            if not training and running_mean is not None and running_var is not None:
                mean, scale = running_mean, (running_var + eps).rsqrt()
            if dx is None:
                dy = torch.zeros_like(x)
            else:
                saved = (mean, scale, training, eps, (True, False, False))
                dy = torch.ops.aten.native_batch_norm_backward(dx, x, w, *moments, *saved)[0]
            per_channel = (1, -1) + (1,) * (x.ndim - 2)
            shift = torch.zeros_like(mean) if db is None else db
            if dw is not None:  # dw x̂ = (dw s) x - dw s m, without a tensor of x's size
                dy.addcmul_(x, (dw * scale).view(per_channel))
                shift = shift - dw * scale * mean
            dy.add_(shift.view(per_channel))
        return forward_ad.make_dual(y, dy)


def unpack_dual(tensor: Any) -> tuple[Any, Any]:
    """A dual number's value and tangent; the tangent is None where there is none."""
    if tensor is None:
        return None, None
    dual = forward_ad.unpack_dual(tensor)
    return dual.primal, dual.tangent
