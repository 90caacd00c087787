r"""Mean gradients of the logits, class by class (paper A, eq. 8).

.. math:: c_k = \frac{1}{|B_k|}\sum_{\mu\in B_k} \nabla_\theta z_k^\mu, \qquad B_k = \{\mu : y^\mu = k\}.

An example contributes to the row of its own class only. Where examples do not interact, the batch is split by class
and all rows together cost about one backward pass over the batch, not C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.batches import Batched, take
from curvspace.curvature.class_batches import (
    add_layer_by_layer,
    by_class,
    checked_logits,
    class_counts,
    class_layout,
    class_members,
    class_sizes,
    known_layers,
    own_logits,
)
from curvspace.curvature.frozen import BatchNorm, FrozenModel
from curvspace.curvature.independence import independent
from curvspace.curvature.layerwise import LayerRecorder
from curvspace.curvature.left_behind import reads_calls_of
from curvspace.denormals import flushed_on
from curvspace.errors import refuse_options
from curvspace.functional import flatten, trainable_parameters
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss, get_loss
from curvspace.losses.recognised import plain_variables
from curvspace.outputs import joined, logits
from curvspace.threads import one_at_a_time

Algorithm = Literal["auto", "split", "vjp"]

AT_ONCE = 128
"""Examples in one pass at least: with fewer, what a pass costs whatever its size is most of it."""


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
        flags, sizes = class_layout(x, y, num_classes, batched)
        counts = class_counts(sizes, y)
        apart = algorithm != "vjp" and (len(y) == 1 or independent(function, x, len(y), flags))
        if algorithm == "split" and not apart:
            raise ValueError('algorithm="split" is not exact: the model does not treat examples one by one; use "vjp"')
        theta, constants = function.parameters(), function.constants()
        c = torch.zeros(num_classes, function.size, dtype=function.dtype, device=function.device)
        with torch.enable_grad(), function.policy_in_force():
            if apart and _layer_by_layer(function, theta, constants, x, y, flags, sizes, c):
                return c, counts
            z = None if apart else checked_logits(function.evaluate(theta, constants, x), num_classes, len(y))
            for k, members, xk in by_class(x, y, sizes, flags if apart else [False] * len(flags)):
                zk = z[members] if z is not None else function.evaluate(theta, constants, xk)
                zk = checked_logits(zk, num_classes)
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
    known, key = known_layers(function, "frozen", x, flags)
    if not known.get(key, True):
        return False

    def differentiated(value: Tensor) -> Tensor:
        return _flat(function.gradient(value, theta), theta)

    order, counts = torch.argsort(y, stable=True), class_counts(sizes, y)
    x, y = take(x, order, flags), y[order]
    passes = -(-len(y) // max(AT_ONCE, max(sizes)))
    labels = torch.arange(len(sizes), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))
    for places in torch.arange(len(y), device="cpu").tensor_split(passes):
        part = slice(int(places[0]), int(places[-1]) + 1)
        recorder = LayerRecorder(theta, len(places))
        with recorder:
            raw = function.evaluate(theta, constants, take(x, part, flags))
        own = own_logits(checked_logits(raw, len(sizes), len(places)), y[part], counts)

        here = torch.bincount(labels[part], minlength=len(sizes)).tolist()
        right = add_layer_by_layer(recorder, own, here, None, theta, c, None if key in known else differentiated)
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
        flags, sizes = class_layout(x, y, num_classes, batched)
        apart = len(y) == 1 or independent(function, x, len(y), flags)
        theta, constants = function.parameters(), function.constants()
        shape = (num_classes, num_classes, function.size)
        c = torch.zeros(shape, dtype=function.dtype, device=function.device)
        with torch.enable_grad(), function.policy_in_force():
            z = None if apart else checked_logits(function.evaluate(theta, constants, x), num_classes, len(y))
            for j, members, xj in by_class(x, y, sizes, flags if apart else [False] * len(flags)):
                zj = z[members] if z is not None else function.evaluate(theta, constants, xj)
                for k, mean in enumerate(checked_logits(zj, num_classes).mean(0)):
                    c[j, k] = _flat(function.gradient(mean, theta), theta)
    return c, class_counts(sizes, y)


def _flat(gradient: list[Tensor | None], like: tuple[Tensor, ...]) -> Tensor:
    return flatten(torch.zeros_like(p) if g is None else g for g, p in zip(gradient, like, strict=True))


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
    class by class; not where the loss reads beside the outputs what a call of the model leaves behind: see
    :func:`vjp_pass`.
    """
    loss = get_loss(loss)
    parameters = list(trainable_parameters(model).values())
    flags, sizes = class_layout(x, y, num_classes, batched)
    known, key = known_layers(FrozenModel(model), "called", x, flags)
    if known.get(key, True) and not torch.is_autocast_enabled(parameters[0].device.type):
        found, right = _layerwise_pass(model, x, y, sizes, loss, checked=key in known)
        if right is not None:
            known[key] = right
        return found
    function = vars(loss).get("_function")
    known, key = known_layers(FrozenModel(model), "read", (x, function, plain_variables(function)), flags)
    if key not in known:
        known[key] = reads_calls_of(model, loss, x, y)
    if known[key]:  # of the last class it would be
        return vjp_pass(model, x, y, num_classes, loss)
    c = parameters[0].new_zeros(num_classes, sum(p.numel() for p in parameters))
    outputs, order = [], []
    for k, members, xk in by_class(x, y, sizes, flags):
        with torch.enable_grad():
            raw = call(model, xk)
            logit = checked_logits(raw, num_classes)[:, k].mean()
        c[k] = _gradient(logit, parameters, retain_graph=True)
        outputs.append(raw)
        order.append(members)
    with torch.enable_grad():
        raw = joined(outputs, torch.argsort(torch.cat(order)))
        value = loss(raw, y)
    gradient = _gradient(value, parameters)
    return ClassPass(value.detach(), gradient, c, class_counts(sizes, y), _own_probabilities(logits(raw), y))


def _layerwise_pass(
    model: nn.Module, x: Inputs, y: Tensor, sizes: list[int], loss: Loss, checked: bool
) -> tuple[ClassPass, bool | None]:
    """The pass, and whether it could be made layer by layer; if not, it was made by one backward pass a class.

    Unless that is ``checked``, it is compared with autograd, by which nothing may be learnt (None).
    """
    parameters, counts = list(trainable_parameters(model).values()), class_counts(sizes, y)
    recorder = LayerRecorder(parameters, len(y))
    with torch.enable_grad():
        with recorder:
            raw = call(model, x)
        z = checked_logits(raw, len(sizes), len(y))
        value = loss(raw, y)
        own = own_logits(z, y, counts)
    differentiated = partial(_gradient, parameters=parameters, retain_graph=True)
    gradient = differentiated(value)
    c = gradient.new_zeros(len(sizes), gradient.numel())
    members = list(class_members(y, sizes))

    order = torch.cat([part for _, part in members])
    right = add_layer_by_layer(recorder, own, sizes, order, parameters, c, None if checked else differentiated)
    if right is False:
        for k, part in members:
            c[k] = differentiated(own[part].sum())
    return ClassPass(value.detach(), gradient, c, counts, _own_probabilities(z, y)), right


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
    sizes = class_sizes(y, num_classes)
    with torch.enable_grad():
        raw = call(model, x)
        z = checked_logits(raw, num_classes, len(y))
        value = loss(raw, y)
    gradient = _gradient(value, parameters, retain_graph=True)
    c = gradient.new_zeros(num_classes, gradient.numel())
    for k, members in class_members(y, sizes):
        with torch.enable_grad():
            logit = z[members, k].mean()
        c[k] = _gradient(logit, parameters, retain_graph=True)
    return ClassPass(value.detach(), gradient, c, class_counts(sizes, y), _own_probabilities(z, y))


def _gradient(value: Tensor, parameters: list[Tensor], retain_graph: bool = False) -> Tensor:
    return flatten(torch.autograd.grad(value, parameters, retain_graph=retain_graph, materialize_grads=True))


def _own_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return z.detach().softmax(1).gather(1, y.long()[:, None])[:, 0]
