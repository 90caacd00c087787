r"""Rules for the orthogonal complement: what is done with :math:`g - QQ^\top g`.

A rule gives the step d (P,) that is *subtracted* from the parameters. Its learning rate (and momentum) stand in the
optimiser's param group, where schedulers find them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvspace.optim.base import require, require_numbers
from curvspace.optim.span import Span


class Outside:
    """Base of these rules. ``defaults`` enter the param group; state is flat vectors in ``state``.

    ``heavy_ball``: the rule reads the group's ``momentum``, which may therefore act on the whole step instead.
    ``whole``: the rule is given the whole gradient. ``proposed``: what a basis of past steps is told of in place of the
    step that was taken; None: the step.
    """

    heavy_ball = False
    whole = False
    proposed: Tensor | None = None

    def __init__(self, lr: float, momentum: float = 0.0, dampening: float | None = 0.0):
        require_numbers(lr=lr, momentum=momentum)
        require(lr >= 0, "lr", lr, "at least 0")
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(dampening is None or 0 <= dampening < 1, "dampening", dampening, "in [0, 1), or None")
        self.defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        self.state: dict[str, Any] = {}

    def step(self, gradient: Tensor, group: dict[str, Any], span: Span | None) -> Tensor:
        """The step (P,) from the gradient outside the span (P,); it has no part in an orthonormal span."""
        raise NotImplementedError

    def moved(self, span: Span) -> None:
        """The basis has changed: what was gathered before may now lie in the span."""


def incoming_weight(momentum: float, dampening: float | None) -> float:
    r"""The weight :math:`1 - \tau` of what is new in a momentum; :math:`\tau = \mu` where it is None."""
    return 1 - (momentum if dampening is None else dampening)


class GradientDescent(Outside):
    r"""Gradient descent with momentum: :math:`b \leftarrow \mu b + (1 - \tau)\,g,\; d = \eta b`; b is g at first.

    As in torch's SGD, the dampening :math:`\tau` is 0 for the heavy ball and :math:`\mu` for a running average; None is
    :math:`\mu` whatever a schedule makes of it.

    When an orthonormal basis moves, the part of b that lies in the new span is removed: momentum gathered in flat
    directions is not spent on sharp ones.
    """

    heavy_ball = True

    def step(self, gradient: Tensor, group: dict[str, Any], span: Span | None) -> Tensor:
        if group["momentum"] == 0:
            return group["lr"] * gradient
        buffer = self.state.get("momentum_buffer")
        if buffer is None:
            buffer = self.state["momentum_buffer"] = gradient.clone()
        else:
            buffer.mul_(group["momentum"]).add_(gradient, alpha=incoming_weight(group["momentum"], group["dampening"]))
        return group["lr"] * buffer

    def moved(self, span: Span) -> None:
        buffer = self.state.get("momentum_buffer")
        if buffer is not None and span.orthonormal:
            buffer.sub_(span.combine(span.coordinates(buffer)))


class Adam(Outside):
    r"""Adam on the gradient outside the span; its step, which scales each coordinate, is projected out of it again.

    :math:`m \leftarrow \beta_1 m + (1-\beta_1) g,\; v \leftarrow \beta_2 v + (1-\beta_2) g^2,\;
    d = (I - QQ^\top)\, \eta \hat m/(\sqrt{\hat v} + \epsilon)`. The betas stand in the param group, as in torch's.
    """

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(lr)
        require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "two numbers in [0, 1)")
        require(eps > 0, "eps", eps, "positive")
        self.defaults["betas"] = tuple(betas)
        self.eps = eps

    def step(self, gradient: Tensor, group: dict[str, Any], span: Span | None) -> Tensor:
        state, (beta1, beta2) = self.state, group["betas"]
        if not state:
            state.update(steps=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["steps"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["square"] / (1 - beta2 ** state["steps"])).sqrt_().add_(self.eps)
        step = (group["lr"] / (1 - beta1 ** state["steps"])) * state["mean"] / denominator
        return span.reject(step) if span is not None and span.orthonormal else step


class Rescaled(Outside):
    r"""Any rule's own step d, scaled by one factor within the span and by another outside of it.

    .. math:: d' = a\,QQ^\top d + b\,(I - QQ^\top)\,d

    The rule keeps its own momentum, which is not projected, and is given the gradient outside the span or, with
    ``whole``, the whole one. ``within=0`` projects its step alone.

    Parameters
    ----------
    rule
        The rule whose step is scaled.
    within, outside
        a and b, at least 0; b may be a function that is asked at each step.
    """

    def __init__(
        self, rule: Outside, within: float = 0.0, outside: float | Callable[[], Tensor] = 1.0, whole: bool = False
    ):
        require(within >= 0, "within", within, "at least 0")
        require(callable(outside) or outside >= 0, "outside", outside, "at least 0")
        self.rule, self.within, self.outside, self.whole = rule, within, outside, whole
        self.defaults = rule.defaults

    @property  # type: ignore[override]
    def state(self) -> dict[str, Any]:
        return self.rule.state

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self.rule.state = value

    def step(self, gradient: Tensor, group: dict[str, Any], span: Span | None) -> Tensor:
        self.proposed = step = self.rule.step(gradient, group, None)
        if span is None:
            return step
        inner = span.combine(span.coordinates(step))
        factor = self.outside() if callable(self.outside) else self.outside
        return factor * (step - inner) + self.within * inner
