"""Any optimiser of torch with the interface of this package, so that one training loop serves all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.functional import Inputs, call
from curvspace.losses import Loss
from curvspace.optim.base import ModelOptimizer

LossLike = str | Loss | Callable[[Tensor, Tensor], Tensor]


class FirstOrder(ModelOptimizer):
    """``FirstOrder(model, torch.optim.SGD, lr=0.1, momentum=0.9).step(x, y)``.

    The wrapped optimiser's param groups and state are this one's: schedulers and checkpoints act on it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: type[torch.optim.Optimizer],
        loss: LossLike = "cross_entropy",
        **options: Any,
    ):
        inner = optimizer([p for p in model.parameters() if p.requires_grad], **options)
        super().__init__(model, inner.defaults, loss)
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        self.inner.zero_grad(set_to_none=True)
        loss = self.loss(call(self.model, inputs), targets)
        loss.backward()
        norms = torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        self.inner.step()
        self.costs.forward += 1
        self.costs.backward += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.param_groups = self.param_groups
        self.inner.state = self.state


def sgd(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's SGD; ``options`` are its own."""
    return FirstOrder(model, torch.optim.SGD, loss, lr=lr, **options)


def adam(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's Adam; ``options`` are its own."""
    return FirstOrder(model, torch.optim.Adam, loss, lr=lr, **options)


def rmsprop(model: nn.Module, lr: float, loss: LossLike = "cross_entropy", **options: Any) -> FirstOrder:
    """Torch's RMSprop; ``options`` are its own."""
    return FirstOrder(model, torch.optim.RMSprop, loss, lr=lr, **options)
