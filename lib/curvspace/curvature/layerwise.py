r"""The class gradients of all classes at once, layer by layer.

A parameter's gradient is a sum over examples of what its layer makes of the example's input a and of the gradient
:math:`\delta` in the example's output (:math:`\delta a^\top` for a linear layer). One backward pass through the
activations gives the :math:`\delta` of :math:`\sum_i z^i_{y_i}/|B_{y_i}|` for all examples; the sum over the examples
of a class is the gradient of the class. Only these last products are made class by class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

Part = Callable[[Tensor, Tensor], Tensor]
"""(a, δ) of some examples -> the sum of their gradients of one parameter."""

_CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}
"""The layers known here, with the names of their arguments in order."""

_HARMLESS = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
)
"""What may be asked of a parameter without computing with it."""


@dataclass(frozen=True)
class _Layer:
    """One call of a layer: its inputs, the place of its outputs in the graph, and its trainable parameters."""

    inputs: Tensor
    edge: GradientEdge
    parts: tuple[tuple[Tensor, Part], ...]


class LayerRecorder(TorchFunctionMode):
    """Inside, a model's layers are noted. ``complete``: nothing but known layers has used its parameters, and each
    had the batch's ``size`` examples along the first dimension of its input."""

    def __init__(self, parameters: Sequence[Tensor], size: int):
        super().__init__()
        self.layers: list[_Layer] = []
        self._wanted = {id(p) for p in parameters}
        self._seen: set[int] = set()
        self._size = size
        self._foreign = False

    @property
    def complete(self) -> bool:
        return not self._foreign and self._seen == self._wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._foreign or func in _HARMLESS:
            return result
        used = [t for t in _tensors((args, kwargs or {})) if id(t) in self._wanted]
        if used:
            layer = self._layer(func, args, kwargs or {}, result)
            if layer is None or len(layer.parts) != len(used):
                self._foreign = True
            else:
                self.layers.append(layer)
                self._seen.update(map(id, used))
        return result

    def _layer(self, func: Any, args: Any, kwargs: Any, result: Any) -> _Layer | None:
        if func not in _ARGUMENTS or not isinstance(result, Tensor) or not result.requires_grad:
            return None
        given = {**dict(zip(_ARGUMENTS[func], args, strict=False)), **kwargs}
        x = given["input"]
        if x.ndim < 2 or x.shape[0] != self._size or result.dtype != x.dtype:
            return None
        rules = _convolution(func, given) if func in _CONVOLUTIONS else _RULES[func](func, given)
        if rules is None:
            return None
        trainable = [(given.get(name), rule) for name, rule in zip(("weight", "bias"), rules, strict=True)]
        parts = tuple((p, rule) for p, rule in trainable if p is not None and id(p) in self._wanted)
        return _Layer(x.detach(), get_gradient_edge(result), parts)


def moves_examples(outputs: Tensor, size: int) -> bool:
    """Whether the graph of ``outputs`` takes the ``size`` examples by indices, sorts them or takes them apart.

    Which goes where may depend on the data, and differ from one batch to the next. Positions that are the same in every
    batch, and what functions of the user's own do, are left to :func:`agrees_with_autograd`.
    """
    waiting = [outputs.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        found = _MOVES.get(node.name())
        if found is not None and found(node, size):
            return True
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting.extend(new)
    return False


def agrees_with_autograd(
    layers: Sequence[_Layer],
    own: Tensor,
    parameters: Sequence[Tensor],
    gradient: Callable[[Tensor], Tensor],
) -> bool | None:
    """Whether a randomly weighted sum of the examples' scalars ``own`` (N,) has the ``gradient`` that autograd says.

    Each parameter is compared, as a model may keep something else than the examples in the first dimension of a layer.
    None: nothing is learnt, as a gradient is zero or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(own), generator=generator, dtype=torch.float32, device="cpu").to(own)
    with torch.enable_grad():
        expected = gradient((weights * own).sum())
    found = torch.zeros_like(expected)
    add_class_gradients(layers, own.sum(), [len(own)], None, parameters, [found], weights)
    if not expected.isfinite().all():
        return None
    sizes = [p.numel() for p in parameters]
    differences = torch.stack([d.norm() for d in (found - expected).split(sizes)])
    norms = torch.stack([e.norm() for e in expected.split(sizes)])
    rounding = min(1e3 * torch.finfo(own.dtype).eps, 1e-3) * expected.norm()
    if not (differences <= 1e-3 * norms + rounding).all():
        return False
    return True if norms.all() else None


def add_class_gradients(
    layers: Sequence[_Layer],
    selected: Tensor,
    counts: Sequence[int],
    order: Tensor | None,
    parameters: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Tensor | None = None,
) -> None:
    r"""Add :math:`\sum_{i\in B_k}\nabla_\theta s_i` to the row (P,) of each class k present.

    Parameters
    ----------
    layers
        Of a complete :class:`LayerRecorder`.
    selected
        :math:`\sum_i s_i`, a scalar of each example, with its graph, which is kept.
    counts
        The number of each class's examples, at least one.
    order
        The positions of the first class's examples, then of the next one's, and so on; None: the batch has this order.
    weights
        Of each example (N,) in the sums; None: one.
    """
    deltas = torch.autograd.grad(selected, [layer.edge for layer in layers], retain_graph=True, allow_unused=True)
    places = {id(p): i for i, p in enumerate(parameters)}
    views = [row.split([p.numel() for p in parameters]) for row in rows]
    with torch.no_grad():
        for layer, delta in zip(layers, deltas, strict=True):
            if delta is None:
                continue
            if weights is not None:
                delta = delta * weights.view(-1, *[1] * (delta.ndim - 1))
            both = (layer.inputs, delta) if order is None else (layer.inputs[order], delta[order])
            for view, a, d in zip(views, *(t.split(list(counts)) for t in both), strict=True):
                for parameter, part in layer.parts:
                    view[places[id(parameter)]].add_(part(a, d).reshape(-1))


def _linear(func: Any, given: dict[str, Any]) -> tuple[Part, Part]:
    return lambda a, d: d.flatten(0, -2).T @ a.flatten(0, -2), lambda a, d: d.flatten(0, -2).sum(0)


def _convolution(func: Any, given: dict[str, Any]) -> tuple[Part, Part] | None:
    dims = _CONVOLUTIONS[func]
    if isinstance(given.get("padding", 0), str) or given["input"].ndim != dims + 2:
        return None
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    geometry = [_as_list(given.get(name, default), dims) for name, default in defaults.items()]
    weight = given["weight"].detach()

    def in_weight(a: Tensor, d: Tensor) -> Tensor:
        options = (None, *geometry, False, [0] * dims, given.get("groups", 1), [False, True, False])
        return torch.ops.aten.convolution_backward(d, a, weight, *options)[1]

    return in_weight, _over_channels


def _by_channel(func: Any, given: dict[str, Any]) -> tuple[Part, Part] | None:
    """Normalisations with a gain and a shift for each channel, the second dimension."""
    if given.get("training", False):
        return None
    bare = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    return lambda a, d: _over_channels(a, func(a, **bare) * d), _over_channels


def _layer_norm(func: Any, given: dict[str, Any]) -> tuple[Part, Part]:
    """A gain and a shift for each entry of the last dimensions."""
    shape, eps = given["normalized_shape"], given.get("eps", 1e-5)

    def over_last(a: Tensor, d: Tensor) -> Tensor:
        return d.flatten(0, -1 - len(shape)).sum(0)

    return lambda a, d: over_last(a, func(a, shape, eps=eps) * d), over_last


def _over_channels(a: Tensor, d: Tensor) -> Tensor:
    return d.sum([0, *range(2, d.ndim)])


_RULES: dict[Any, Callable[[Any, dict[str, Any]], tuple[Part, Part] | None]] = {
    F.linear: _linear,
    F.batch_norm: _by_channel,
    F.group_norm: _by_channel,
    F.layer_norm: _layer_norm,
}


def _as_list(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _along_first(node: Any, size: int) -> bool:
    """Whether a function acts along the first dimension of its result."""
    dims = getattr(node, "_saved_dims", None) or (getattr(node, "_saved_dim", 0),)
    return any(d in (0, 2**64 - len(node._input_metadata[0].shape)) for d in dims)  # dimensions < 0 are as given


def _by_indices(node: Any, size: int) -> bool:
    first = node._saved_indices[0]
    return first is not None and not torch.equal(first.flatten(), torch.arange(first.numel(), device=first.device))


def _taken_apart(node: Any, size: int) -> bool:
    whole = getattr(node, "_saved_start", 1) == 0 and node._saved_end >= size and node._saved_step == 1
    return node._saved_dim == 0 and node._saved_self_sym_sizes[0] == size and not whole


def _written(where: Callable[[Any, int], bool]) -> Callable[[Any, int], bool]:
    """Where what is written into a tensor has a graph: the tensor itself keeps its places."""
    return lambda node, size: node.next_functions[-1][0] is not None and where(node, size)


_MOVES: dict[str, Callable[[Any, int], bool]] = {
    **dict.fromkeys(("IndexSelectBackward0", "GatherBackward0", "FlipBackward0", "RollBackward0"), _along_first),
    **dict.fromkeys(("SortBackward0", "TopkBackward0"), _along_first),
    **dict.fromkeys(("IndexBackward0", "UnsafeIndexBackward0"), _by_indices),
    **dict.fromkeys(("IndexPutBackward0", "UnsafeIndexPutBackward0"), _written(_by_indices)),
    **dict.fromkeys(("IndexCopyBackward0", "IndexAddBackward0", "IndexReduceBackward0"), _written(_along_first)),
    **dict.fromkeys(("ScatterBackward0", "ScatterAddBackward0", "ScatterReduceBackward0"), _written(_along_first)),
    **dict.fromkeys(("MaskedSelectBackward0", "TakeBackward0", "EmbeddingBackward0"), lambda node, size: True),
    **dict.fromkeys(("MaskedScatterBackward0", "PutBackward0"), _written(lambda node, size: True)),
    **dict.fromkeys(("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"), _taken_apart),
    "UnbindBackward0": lambda node, size: node._saved_dim == 0 and len(node._input_metadata) == size,
    "MmBackward0": _written(lambda node, size: node.next_functions[1][0].name() != "TBackward0"),
}
"""The functions that may move examples along the first dimension, by their names in the graph, and whether one does."""
