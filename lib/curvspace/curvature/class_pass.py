"""Loss, gradient and class gradients of a minibatch at once, as optimisers take them: in the model's present mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.batches import Batched
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
from curvspace.curvature.frozen import FrozenModel
from curvspace.curvature.layerwise import LayerRecorder
from curvspace.functional import flatten, trainable_parameters
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss, get_loss
from curvspace.outputs import joined, logits


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
    class by class.
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
