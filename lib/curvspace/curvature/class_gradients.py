r"""Mean gradients of the logits, class by class (paper A, eq. 8).

.. math:: c_k = \frac{1}{|B_k|}\sum_{\mu\in B_k} \nabla_\theta z_k^\mu, \qquad B_k = \{\mu : y^\mu = k\}.

An example contributes to the row of its own class only. Where examples do not interact, the batch is split by class
and all rows together cost about one backward pass over the batch, not C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvspace.curvature.fingerprint import fingerprint
from curvspace.curvature.frozen import BatchNorm, FrozenModel
from curvspace.curvature.layerwise import LayerRecorder, add_class_gradients, agrees_with_autograd, moves_examples
from curvspace.curvature.split import REMEMBERED, independent
from curvspace.denormals import flushed_on
from curvspace.errors import refuse_options
from curvspace.functional import flatten, trainable_parameters
from curvspace.inputs import Batched, Inputs, batch_flags, batch_size, call, take
from curvspace.losses import Loss, get_loss
from curvspace.outputs import joined, logits
from curvspace.preserved import preserved_buffers
from curvspace.threads import one_at_a_time

Algorithm = Literal["auto", "split", "vjp"]

AT_ONCE = 128
"""Examples in one pass at least: with fewer, what a pass costs whatever its size is most of it."""


@dataclass(frozen=True)
class ClassPass:
    """One pass over a minibatch.

    Attributes
    ----------
    loss : scalar, the mean loss
    gradient : (P,), its gradient
    class_gradients : (C, P), zero rows for absent classes
    counts : (C,) examples of each class
    probabilities : (N,), the softmax probability of each example's own class
    """

    loss: Tensor
    gradient: Tensor
    class_gradients: Tensor
    counts: Tensor
    probabilities: Tensor


def splits_exactly(
    model: nn.Module, x: Inputs, y: Tensor, *, batched: Batched = None, batch_norm: BatchNorm = None
) -> bool:
    """Whether the model treats the examples one by one, so that a batch may be split by class, or a part of it taken.

    Tried once for a model and its modes, on a few examples; see :func:`~curvspace.curvature.split.independent`.
    """
    n = y.shape[0]
    return n == 1 or independent(FrozenModel(model, batch_norm), x, n, batch_flags(x, n, batched))


def require_part_exact(
    model: nn.Module, x: Inputs, y: Tensor, fraction: float, *, batch_norm: BatchNorm = None
) -> None:
    """Raise ``ValueError`` where the first examples of a batch alone would be another function of the parameters.

    Batch statistics are those of the part.
    """
    if not any(batch_flags(x, len(y))):
        raise ValueError(f"a batch of {batch_size(x)} inputs has {len(y)} targets")
    if FrozenModel(model, batch_norm).uses_batch_statistics or splits_exactly(model, x, y, batch_norm=batch_norm):
        return
    raise ValueError(
        f"fraction={fraction} of a batch would be another function: {type(model).__name__} does not treat "
        "examples one by one; use fraction=1"
    )


def number_of_classes(model: nn.Module, x: Inputs) -> int:
    """C by the model's outputs (N, C); its buffers stay as they are.

    Raises ``ValueError`` for outputs of another form.
    """
    with preserved_buffers(model), torch.no_grad():
        z = logits(call(model, x), "class gradients need one tensor (N, C)")
    if z.ndim != 2:
        raise ValueError(f"the model's outputs have shape {tuple(z.shape)}; class gradients need (N, C)")
    return z.shape[1]


def split_pass(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
    *,
    batched: Batched = None,
) -> ClassPass:
    """Loss, gradient and class gradients by one forward and two backward passes over the batch.

    The model is called in its present mode. Exact only where :func:`splits_exactly` says so. The loss is taken of all
    outputs together, so it may be any. A model of known layers is evaluated once and split layer by layer, any other
    class by class.
    """
    loss = get_loss(loss)
    parameters = list(trainable_parameters(model).values())
    flags, sizes = _layout(x, y, num_classes, batched)
    known, key = _known(FrozenModel(model), "called", x, flags)
    if known.get(key, True) and not torch.is_autocast_enabled(parameters[0].device.type):
        found, right = _layerwise_pass(model, x, y, sizes, loss, checked=key in known)
        if right is not None:
            known[key] = right
        return found
    c = parameters[0].new_zeros(num_classes, sum(p.numel() for p in parameters))
    outputs, order = [], []
    for k, members, xk in _by_class(x, y, sizes, flags):
        with torch.enable_grad():
            raw = call(model, xk)
            logit = _checked_outputs(raw, num_classes)[:, k].mean()
        c[k] = _gradient(logit, parameters, retain_graph=True)
        outputs.append(raw)
        order.append(members)
    with torch.enable_grad():
        raw = joined(outputs, torch.argsort(torch.cat(order)))
        value = loss(raw, y)
    gradient = _gradient(value, parameters)
    return ClassPass(value.detach(), gradient, c, _counts(sizes, y), _own_probabilities(logits(raw), y))


_known_layers: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
"""For a model, as it is and is called: whether its class gradients come right layer by layer."""


def _known(function: FrozenModel, way: str, x: Inputs, flags: Sequence[bool]) -> tuple[dict[Any, bool], Any]:
    """What is remembered of a model, and the key of its present state; nothing where a change could not be seen."""
    what = fingerprint(function.model, function.names, x, flags)
    if what is None:
        return {}, None
    known = _known_layers.setdefault(function.model, {})
    while len(known) >= REMEMBERED:
        known.pop(next(iter(known)))
    return known, (way, function.modes, tuple(function.names), what)


def _layerwise_pass(
    model: nn.Module, x: Inputs, y: Tensor, sizes: list[int], loss: Loss, checked: bool
) -> tuple[ClassPass, bool | None]:
    """The pass, and whether it could be made layer by layer; if not, it was made by one backward pass a class.

    Unless that is ``checked``, it is compared with autograd, by which nothing may be learnt (None).
    """
    parameters, counts = list(trainable_parameters(model).values()), _counts(sizes, y)
    recorder = LayerRecorder(parameters, len(y))
    with torch.enable_grad():
        with recorder:
            raw = call(model, x)
        z = _checked_outputs(raw, len(sizes), len(y))
        value = loss(raw, y)
        own = _weighted(z, y, counts)
    differentiated = partial(_gradient, parameters=parameters, retain_graph=True)
    gradient = differentiated(value)
    c = gradient.new_zeros(len(sizes), gradient.numel())
    members = list(_members(y, sizes))

    order = torch.cat([part for _, part in members])
    right = _by_layer(recorder, own, sizes, order, parameters, c, None if checked else differentiated)
    if right is False:
        for k, part in members:
            c[k] = differentiated(own[part].sum())
    return ClassPass(value.detach(), gradient, c, counts, _own_probabilities(z, y)), right


def _by_layer(
    recorder: LayerRecorder,
    own: Tensor,
    sizes: list[int],
    order: Tensor | None,
    parameters: Sequence[Tensor],
    c: Tensor,
    differentiated: Callable[[Tensor], Tensor] | None,
) -> bool | None:
    """Add the examples' part of the class gradients to c; False, and c is as it was, where that cannot be done.

    own (N,) is of :func:`_weighted`, with its graph, which is kept; ``sizes`` are of the classes in these examples;
    ``order`` sorts them by class, None if they are sorted. With ``differentiated``, autograd's gradient of a scalar, it
    is tried before whether that can be done, of which None says that nothing was learnt.
    """
    if not recorder.complete or moves_examples(own, len(own)):
        return False
    right = agrees_with_autograd(recorder.layers, own, parameters, differentiated) if differentiated else True
    if right is not False:
        rows = [c[k] for k, size in enumerate(sizes) if size]
        add_class_gradients(recorder.layers, own.sum(), [size for size in sizes if size], order, parameters, rows)
    return right


def vjp_pass(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
) -> ClassPass:
    """The same by one forward pass and one backward pass per class present: exact with batch statistics too."""
    loss = get_loss(loss)
    parameters = list(trainable_parameters(model).values())
    sizes = _class_sizes(y, num_classes)
    with torch.enable_grad():
        raw = call(model, x)
        z = _checked_outputs(raw, num_classes, len(y))
        value = loss(raw, y)
    gradient = _gradient(value, parameters, retain_graph=True)
    c = gradient.new_zeros(num_classes, gradient.numel())
    for k, members in _members(y, sizes):
        with torch.enable_grad():
            logit = z[members, k].mean()
        c[k] = _gradient(logit, parameters, retain_graph=True)
    return ClassPass(value.detach(), gradient, c, _counts(sizes, y), _own_probabilities(z, y))


@one_at_a_time
def class_gradients(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    algorithm: Algorithm = "auto",
    *,
    batch_norm: BatchNorm = None,
    dtype: torch.dtype | None = None,
    batched: Batched = None,
    **old: object,
) -> tuple[Tensor, Tensor]:
    """Class gradients (C, P), with zero rows for absent classes, and the counts (C,).

    Parameters
    ----------
    algorithm
        ``"split"``: the batch by class, about one pass in all; needs examples that do not interact.
        ``"vjp"``: one vector-Jacobian product per class through the shared graph. ``"auto"``: split where exact.
    batch_norm
        Batch normalisation by ``"batch"`` or ``"running"`` statistics (None: the module's mode).
    batched
        Which inputs have the examples along their first dimension, as for an objective.

    Raises
    ------
    ValueError
        If targets are not class indices below C, or ``"split"`` is asked for where examples interact.
    """
    refuse_options("class_gradients", {"method": "algorithm", "state": "batch_norm"}, old)
    function = FrozenModel(model, batch_norm, None, dtype)
    if algorithm not in ("auto", "split", "vjp"):
        raise ValueError(f'algorithm must be "auto", "split" or "vjp", got {algorithm!r}')
    if algorithm == "split" and function.uses_batch_statistics:
        raise ValueError(
            'algorithm="split" is not exact with batch statistics; use algorithm="vjp" or batch_norm="running"'
        )
    with torch.inference_mode(False), flushed_on(function.device):
        x, y = function.cast(x), function.cast(y)
        flags, sizes = _layout(x, y, num_classes, batched)
        counts = _counts(sizes, y)
        apart = algorithm != "vjp" and (len(y) == 1 or independent(function, x, len(y), flags))
        if algorithm == "split" and not apart:
            raise ValueError('algorithm="split" is not exact: the model does not treat examples one by one; use "vjp"')
        theta, constants = function.parameters(), function.constants()
        c = torch.zeros(num_classes, function.size, dtype=function.dtype, device=function.device)
        with torch.enable_grad(), function.policy_in_force():
            if apart and _layer_by_layer(function, theta, constants, x, y, flags, sizes, c):
                return c, counts
            z = None if apart else _checked_outputs(function.evaluate(theta, constants, x), num_classes, len(y))
            for k, members, xk in _by_class(x, y, sizes, flags if apart else [False] * len(flags)):
                zk = z[members] if z is not None else function.evaluate(theta, constants, xk)
                zk = _checked_outputs(zk, num_classes)
                c[k] = _flat(function.gradient(zk[:, k].mean(), theta), theta)
    return c, counts


def _layer_by_layer(
    function: FrozenModel,
    theta: tuple[Tensor, ...],
    constants: dict[str, Tensor],
    x: Inputs,
    y: Tensor,
    flags: Sequence[bool],
    sizes: list[int],
    c: Tensor,
) -> bool:
    """Fill the zero rows of c; False, c still zero, if some layer is not known.

    The batch, sorted by class, is cut into passes of ``AT_ONCE`` examples or as many as the largest class has.
    """
    known, key = _known(function, "frozen", x, flags)
    if not known.get(key, True):
        return False

    def differentiated(value: Tensor) -> Tensor:
        return _flat(function.gradient(value, theta), theta)

    order, counts = torch.argsort(y, stable=True), _counts(sizes, y)
    x, y = take(x, order, flags), y[order]
    passes = -(-len(y) // max(AT_ONCE, max(sizes)))
    labels = torch.arange(len(sizes), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))
    for places in torch.arange(len(y), device="cpu").tensor_split(passes):
        part = slice(int(places[0]), int(places[-1]) + 1)
        recorder = LayerRecorder(theta, len(places))
        with recorder:
            raw = function.evaluate(theta, constants, take(x, part, flags))
        own = _weighted(_checked_outputs(raw, len(sizes), len(places)), y[part], counts)

        here = torch.bincount(labels[part], minlength=len(sizes)).tolist()
        right = _by_layer(recorder, own, here, None, theta, c, None if key in known else differentiated)
        if right is not None:
            known[key] = right
        if right is False:
            c.zero_()
            return False
    return True


def class_curvatures(c: Tensor, probabilities: Tensor, y: Tensor) -> Tensor:
    r"""Paper A, eq. 12: :math:`\lambda_k = \frac{1}{|B|}\sum_{\mu\in B_k} p^\mu(1-p^\mu)\,|c_k|^2`, (C,).

    c are class gradients (C, P), ``probabilities`` (N,) the softmax probability of each example's own class y (N,).
    """
    spread = torch.zeros(len(c), dtype=probabilities.dtype, device=c.device)
    spread.index_add_(0, y.long(), probabilities * (1 - probabilities))
    return spread / len(y) * c.square().sum(1)


@one_at_a_time
def cross_class_gradients(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    *,
    batch_norm: BatchNorm = None,
    dtype: torch.dtype | None = None,
    batched: Batched = None,
) -> tuple[Tensor, Tensor]:
    r"""The mean gradient of every logit over every class.

    .. math:: c_{jk} = \frac{1}{|B_j|}\sum_{\mu\in B_j}\nabla_\theta z_k^\mu

    Shape (C, C, P), first the examples' class j, then the logit k; the counts are (C,). Costs about C passes.
    """
    function = FrozenModel(model, batch_norm, None, dtype)
    with torch.inference_mode(False):
        x, y = function.cast(x), function.cast(y)
        flags, sizes = _layout(x, y, num_classes, batched)
        apart = len(y) == 1 or independent(function, x, len(y), flags)
        theta, constants = function.parameters(), function.constants()
        shape = (num_classes, num_classes, function.size)
        c = torch.zeros(shape, dtype=function.dtype, device=function.device)
        with torch.enable_grad(), function.policy_in_force():
            z = None if apart else _checked_outputs(function.evaluate(theta, constants, x), num_classes, len(y))
            for j, members, xj in _by_class(x, y, sizes, flags if apart else [False] * len(flags)):
                zj = z[members] if z is not None else function.evaluate(theta, constants, xj)
                for k, mean in enumerate(_checked_outputs(zj, num_classes).mean(0)):
                    c[j, k] = _flat(function.gradient(mean, theta), theta)
    return c, _counts(sizes, y)


def _gradient(value: Tensor, parameters: list[Tensor], retain_graph: bool = False) -> Tensor:
    return flatten(torch.autograd.grad(value, parameters, retain_graph=retain_graph, materialize_grads=True))


def _weighted(z: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    r""":math:`z^i_{y_i} / |B_{y_i}|` of each example (N,): the sum over a class has the class gradient."""
    return z.gather(1, y.long()[:, None])[:, 0] / counts[y.long()]


def _flat(gradient: list[Tensor | None], like: tuple[Tensor, ...]) -> Tensor:
    return flatten(torch.zeros_like(p) if g is None else g for g, p in zip(gradient, like, strict=True))


def _own_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return z.detach().softmax(1).gather(1, y.long()[:, None])[:, 0]


def _layout(x: Inputs, y: Tensor, num_classes: int, batched: Batched) -> tuple[tuple[bool, ...], list[int]]:
    """Which inputs are cut with the batch, and the sizes of the classes."""
    sizes = _class_sizes(y, num_classes)
    flags = batch_flags(x, len(y), batched)
    if batched is None and not any(flags):
        raise ValueError(f"a batch of {batch_size(x)} inputs has {len(y)} targets")
    return flags, sizes


def _class_sizes(y: Tensor, num_classes: int) -> list[int]:
    """Of each class, how many examples it has: known to the host after waiting for a device once."""
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"class gradients need integer targets of shape (N,), got {y.dtype} {tuple(y.shape)}")
    if len(y) == 0:
        raise ValueError("a batch of class gradients is empty")
    y = y.long().cpu()
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"targets must be in 0..{num_classes - 1}, got {low}..{high}")
    return torch.bincount(y, minlength=num_classes).tolist()


def _counts(sizes: list[int], y: Tensor) -> Tensor:
    return torch.tensor(sizes, device=y.device)


def _members(y: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Each class present, with the positions of its examples."""
    parts = torch.argsort(y, stable=True).split(sizes)
    yield from ((k, part) for k, part in enumerate(parts) if len(part))


def _by_class(x: Inputs, y: Tensor, sizes: list[int], flags: Sequence[bool]) -> Iterator[tuple[int, Tensor, Inputs]]:
    """Each class present, with the positions of its examples and their inputs (sorted once, then views)."""
    ordered = take(x, torch.argsort(y, stable=True), flags)
    start = 0
    for k, members in _members(y, sizes):
        part = slice(start, start + len(members))
        yield k, members, take(ordered, part, flags)
        start += len(members)


def _checked_outputs(outputs: Any, num_classes: int, size: int | None = None) -> Tensor:
    z = logits(outputs, "class gradients need one tensor (N, C)")
    if z.ndim != 2 or z.shape[1] != num_classes or (size is not None and z.shape[0] != size):
        raise ValueError(f"the model's outputs have shape {tuple(z.shape)}; class gradients need (N, {num_classes})")
    return z
