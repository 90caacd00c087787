r"""Mean gradients of the logits, class by class (paper A, eq. 8).

.. math:: c_k = \frac{1}{|B_k|}\sum_{\mu\in B_k} \nabla_\theta z_k^\mu, \qquad B_k = \{\mu : y^\mu = k\}.

An example contributes to the row of its own class only. Where examples do not interact, the batch is split by class
and all rows together cost about one backward pass over the batch, not C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from curvspace.curvature.frozen import FrozenModel, State
from curvspace.functional import Inputs, batch_size, call, flatten, select, trainable_parameters
from curvspace.losses import Loss, get_loss

Method = Literal["auto", "split", "vjp"]


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
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
) -> ClassPass:
    """Loss, gradient and class gradients by one forward and two backward passes over the batch, class by class.

    The model is called in its present mode. Exact only where examples do not interact (no batch statistics).
    """
    loss = get_loss(loss)
    parameters = list(trainable_parameters(model).values())
    counts = _class_counts(x, y, num_classes)
    c = parameters[0].new_zeros(num_classes, sum(p.numel() for p in parameters))
    own = parameters[0].new_zeros(len(y))
    parts = []
    for k, members, xk in _by_class(x, y, counts):
        with torch.enable_grad():
            z = _checked_outputs(call(model, xk), num_classes)
            logit = z[:, k].mean()
            parts.append(loss(z, y[members]) * (len(members) / len(y)))
        c[k] = flatten(torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True))
        own[members] = z.detach().softmax(1)[:, k].to(own.dtype)
    with torch.enable_grad():
        value = torch.stack(parts).sum()
    gradient = flatten(torch.autograd.grad(value, parameters, materialize_grads=True))
    return ClassPass(value.detach(), gradient, c, counts, own)


def vjp_pass(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
) -> ClassPass:
    """The same by one forward pass and one backward pass per class present: exact with batch statistics too."""
    loss = get_loss(loss)
    parameters = list(trainable_parameters(model).values())
    counts = _class_counts(x, y, num_classes)
    with torch.enable_grad():
        z = _checked_outputs(call(model, x), num_classes)
        value = loss(z, y)
    gradient = flatten(torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True))
    c = gradient.new_zeros(num_classes, gradient.numel())
    for k, members, _ in _by_class(x, y, counts):
        with torch.enable_grad():
            logit = z[members, k].mean()
        c[k] = flatten(torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True))
    own = z.detach().softmax(1).gather(1, y[:, None])[:, 0]
    return ClassPass(value.detach(), gradient, c, counts, own)


def class_gradients(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    num_classes: int,
    method: Method = "auto",
    *,
    state: State = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Class gradients (C, P), with zero rows for absent classes, and the counts (C,).

    Parameters
    ----------
    method
        ``"split"``: the batch by class, about one pass in all; needs examples that do not interact.
        ``"vjp"``: one vector-Jacobian product per class through the shared graph. ``"auto"``: split where exact.
    state
        Batch normalisation by ``"batch"`` or ``"running"`` statistics (None: the module's mode).

    Raises
    ------
    ValueError
        If targets are not class indices below C, or ``"split"`` is asked for with batch statistics.
    """
    function = FrozenModel(model, state, None, dtype)
    if method not in ("auto", "split", "vjp"):
        raise ValueError(f'method must be "auto", "split" or "vjp", got {method!r}')
    if method == "split" and function.uses_batch_statistics:
        raise ValueError('method="split" is not exact with batch statistics; use method="vjp" or state="running"')
    theta, constants = function.parameters(), function.constants()
    x, y = function.cast(x), y.to(function.device)
    counts = _class_counts(x, y, num_classes)
    c = torch.zeros(num_classes, sum(p.numel() for p in theta), dtype=function.dtype, device=function.device)
    shared = function.uses_batch_statistics or method == "vjp"
    with torch.enable_grad(), function.policy_in_force():
        z = _checked_outputs(function.evaluate(theta, constants, x), num_classes) if shared else None
        for k, members, xk in _by_class(x, y, counts):
            zk = _checked_outputs(function.evaluate(theta, constants, xk), num_classes) if z is None else z[members]
            c[k] = flatten(torch.autograd.grad(zk[:, k].mean(), theta, retain_graph=shared, materialize_grads=True))
    return c, counts


def class_curvatures(c: Tensor, probabilities: Tensor, y: Tensor) -> Tensor:
    r"""Paper A, eq. 12: :math:`\lambda_k = \frac{1}{|B|}\sum_{\mu\in B_k} p^\mu(1-p^\mu)\,|c_k|^2`, (C,).

    c are class gradients (C, P), ``probabilities`` (N,) the softmax probability of each example's own class y (N,).
    """
    spread = torch.zeros(len(c), dtype=probabilities.dtype, device=c.device)
    spread.index_add_(0, y, probabilities * (1 - probabilities))
    return spread / len(y) * c.square().sum(1)


def cross_class_gradients(
    model: nn.Module, x: Inputs, y: Tensor, num_classes: int, *, state: State = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    r"""The mean gradient of every logit over every class.

    .. math:: c_{jk} = \frac{1}{|B_j|}\sum_{\mu\in B_j}\nabla_\theta z_k^\mu

    Shape (C, C, P), first the examples' class j, then the logit k; the counts are (C,). Costs about C passes.
    """
    function = FrozenModel(model, state, None, dtype)
    theta, constants = function.parameters(), function.constants()
    x, y = function.cast(x), y.to(function.device)
    counts = _class_counts(x, y, num_classes)
    size = sum(p.numel() for p in theta)
    c = torch.zeros(num_classes, num_classes, size, dtype=function.dtype, device=function.device)
    with torch.enable_grad():
        z = _checked_outputs(function(theta, constants, x), num_classes) if function.uses_batch_statistics else None
        for j, members, xj in _by_class(x, y, counts):
            zj = function(theta, constants, xj) if z is None else z[members]
            for k, mean in enumerate(_checked_outputs(zj, num_classes).mean(0)):
                c[j, k] = flatten(torch.autograd.grad(mean, theta, retain_graph=True, materialize_grads=True))
    return c, counts


def _class_counts(x: Inputs, y: Tensor, num_classes: int) -> Tensor:
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"class gradients need integer targets of shape (N,), got {y.dtype} {tuple(y.shape)}")
    if len(y) != batch_size(x) or len(y) == 0:
        raise ValueError(f"a batch of {batch_size(x)} inputs has {len(y)} targets")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"targets must be in 0..{num_classes - 1}, got {low}..{high}")
    return torch.bincount(y, minlength=num_classes)


def _by_class(x: Inputs, y: Tensor, counts: Tensor) -> Iterator[tuple[int, Tensor, Inputs]]:
    """Each class present, with the positions of its examples and their inputs (sorted once, then views)."""
    order = torch.argsort(y, stable=True)
    ordered = select(x, order)
    start = 0
    for k, count in enumerate(counts.tolist()):
        if count:
            part = slice(start, start + count)
            yield k, order[part], select(ordered, part)
        start += count


def _checked_outputs(z: Tensor, num_classes: int) -> Tensor:
    if z.ndim != 2 or z.shape[1] != num_classes:
        raise ValueError(f"the model's outputs have shape {tuple(z.shape)}; class gradients need (N, {num_classes})")
    return z
