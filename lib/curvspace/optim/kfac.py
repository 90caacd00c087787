"""K-FAC (Martens and Grosse 2015) on curvlinops' Kronecker factors: the second-order baseline of paper C, section 4.4.

The factors, their damped inverse and its product with the gradient are curvlinops'; this module averages the factors
over minibatches and takes the step. Needs ``pip install curvlinops-for-pytorch``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvspace.functional import flatten, unflatten
from curvspace.inner import norm
from curvspace.inputs import Inputs, call, copies_of
from curvspace.losses import CrossEntropy, Loss
from curvspace.optim.base import ModelOptimizer, require, require_count, require_numbers
from curvspace.outputs import logits


class KFAC(ModelOptimizer):
    """w ← w + v with v ← momentum · v − lr · (F̂ + damping)⁻¹ g, F̂ the averaged Kronecker approximation of the Fisher.

    For networks of linear and convolutional layers under cross-entropy, inputs a tensor. F is the Gauss-Newton matrix
    of the loss as it is given: a mean or a sum, with class weights, ignored labels and smoothing. Every
    ``refresh_every`` steps the present minibatch's factors (labels drawn from the model: one more forward and backward
    pass) are added with weight 1 − ``average`` and inverted; the mean is corrected for its start at zero. ``damping``
    enters both factors as in K-FAC, section 6.3.

    Raises ``ValueError`` for a bad hyper-parameter, ``ImportError`` without curvlinops.
    """

    distributed = False

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss = "cross_entropy",
        lr: float = 0.01,
        momentum: float = 0.9,
        damping: float = 0.1,
        average: float = 0.95,
        refresh_every: int = 1,
    ):
        require_numbers(lr=lr, momentum=momentum, damping=damping, average=average)
        require(lr > 0, "lr", lr, "positive")
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(damping > 0, "damping", damping, "positive")
        require(0 <= average < 1, "average", average, "in [0, 1)")
        require_count("refresh_every", refresh_every)
        super().__init__(model, {"lr": lr, "momentum": momentum, "damping": damping, "average": average}, loss)
        require(isinstance(self.loss, CrossEntropy), "loss", loss, "cross_entropy")
        self._factors: dict[str, dict[str, Tensor]] = {}
        self._updates = 0
        self.refresh_every = refresh_every
        self._inverse: Any = None

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        group = self.param_groups[0]
        parameters = group["params"]
        outputs = call(self.model, inputs)
        loss = self.loss(outputs, targets)
        gradient = flatten(torch.autograd.grad(loss, parameters))
        self.grad_norm = norm(gradient)
        refresh = self.steps % self.refresh_every == 0
        if refresh or self._inverse is None:
            self._inverse = self._inverted(inputs, targets, logits(outputs).detach(), refresh)
        direction = unflatten(self._inverse @ gradient, parameters)
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(d, alpha=-group["lr"])
                p.add_(velocity)
        self.costs.forward += 1 + refresh
        self.costs.backward += 1 + refresh
        return loss

    def _inverted(self, inputs: Inputs, targets: Tensor, outputs: Tensor, refresh: bool) -> Any:
        """The damped inverse of curvlinops' operator with the running mean of the factors in place of a minibatch's.

        Without ``refresh`` (after a reload) the mean is as it was.
        """
        from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator

        group = self.param_groups[0]
        assert isinstance(self.loss, CrossEntropy)
        operator = KFACLinearOperator(
            self.model,
            _OwnLabels(self.loss.position_weights(outputs, targets)),
            group["params"],
            [(copies_of(inputs), targets)],
            check_deterministic=False,
            fisher_type=FisherType.MC,
            separate_weight_and_bias=False,
            seed=self._updates,
        )
        weight = group["average"]
        if refresh:
            operator.compute_kronecker_factors()
            self._updates += 1
        for kind in ("input_covariances", "gradient_covariances"):
            factors = getattr(operator, f"_{kind}")
            past = self._factors.setdefault(kind, {name: torch.zeros_like(f) for name, f in factors.items()})
            for name in past:
                if refresh:
                    past[name].mul_(weight).add_(factors[name], alpha=1 - weight)
                factors[name] = past[name] / (1 - weight**self._updates)
        return KFACInverseLinearOperator(operator, damping=group["damping"], use_heuristic_damping=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse": None}  # made again from the factors

    def _extra_state(self) -> dict[str, Any]:
        factors = {kind: {name: f.clone() for name, f in found.items()} for kind, found in self._factors.items()}
        return {"updates": self._updates, "factors": factors}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        self._updates, self._inverse = state["updates"], None
        self._factors = {
            kind: {name: f.to(device).clone() for name, f in found.items()} for kind, found in state["factors"].items()
        }


class _OwnLabels(nn.CrossEntropyLoss):
    r""":math:`-\sum_n \sqrt{w_n} \log p_{n\hat y_n}` for labels drawn from the model.

    Second moments of its gradients in the outputs are :math:`w_n(\mathrm{diag}\,p_n - p_n p_n^\top)`, which is the
    loss's Hessian in them for its own weights :math:`w_n`.
    """

    def __init__(self, weights: Tensor):
        super().__init__(reduction="sum")
        self._roots = weights.reshape(-1).sqrt()

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (self._roots * F.cross_entropy(outputs, labels, reduction="none")).sum()
