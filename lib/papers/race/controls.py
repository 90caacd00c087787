"""Optimisers that would take the filters' explanation away if they did as well: kinds of the race's config.

``{kind: "papers.race.controls:last_layer_sgd", factor: 0.1}``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from curvspace.functional import trainable_parameters
from curvspace.optim.bases import ClassGradients
from curvspace.optim.configurations import LossLike
from curvspace.optim.drop import Drop
from curvspace.optim.first_order import FirstOrder
from curvspace.optim.outside import Adam, Rescaled
from curvspace.optim.subspace_newton import SubspaceNewton


def last_layer_sgd(
    model: nn.Module, lr: float, loss: LossLike = "cross_entropy", *, factor: float = 0.1, **options: Any
) -> FirstOrder:
    r"""Torch's SGD with the rate :math:`\texttt{factor}\cdot\eta` in the last layer and :math:`\eta` elsewhere.

    The class gradients' largest part lies in the last layer: is it enough to go slowly there? The last layer is the
    module that owns the model's last trainable parameter; a schedule moves both rates. ``options`` are torch's own.
    """
    parameters = trainable_parameters(model)
    owner = next(reversed(parameters)).rpartition(".")[0]
    last = {name for name in parameters if name.rpartition(".")[0] == owner}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in last], "lr": lr},
        {"params": [p for name, p in parameters.items() if name in last], "lr": factor * lr},
    ]
    return FirstOrder(model, torch.optim.SGD, loss, [g for g in groups if g["params"]], lr=lr, **options)


def adam_step_projected(
    model: nn.Module,
    num_classes: int,
    lr: float = 1e-3,
    momentum: float = 0.9,
    loss: LossLike = "cross_entropy",
    *,
    refresh_every: int = 10,
) -> SubspaceNewton:
    r"""Adam on the whole gradient, its step without the class gradients' span.

    .. math:: d = (I - QQ^\top)\,\mathrm{Adam}(g)

    Adam on the filtered gradient has a smaller second moment and so takes longer steps. Here both moments are the whole
    gradient's: what this does not gain, and the filtered one does, is the rate's. ``momentum`` is :math:`\beta_1`; the
    span is :class:`~curvspace.optim.span_filter.SpanFilter`'s with ``fraction=1``.
    """
    basis = ClassGradients(orthonormal=True, batch_norm="running", num_classes=num_classes)
    rule = Rescaled(Adam(lr, (momentum, 0.999)), within=0.0, whole=True)
    return SubspaceNewton(model, basis, Drop(), rule, loss, refresh_every=refresh_every)
