r"""Curvature as an adaptive optimiser sees it: :math:`P^{-1/2} A P^{-1/2}`.

A torch optimiser with step :math:`\theta \leftarrow \theta - \eta P^{-1} m`, P diagonal, is stable on a quadratic
while the largest eigenvalue of the preconditioned Hessian is below :math:`2/\eta`, or, with momentum
:math:`m \leftarrow \beta m + (1-\beta) g`, below :math:`(2+2\beta)/((1-\beta)\eta)`: :math:`38/\eta` for Adam's
:math:`\beta = 0.9`. Where param groups have rates :math:`\eta_i` of their own, :math:`\eta` is the largest of them and
P is divided by :math:`\eta_i/\eta`: the bounds hold as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvspace.curvature.operators import CurvatureOperator
from curvspace.functional import flatten


class PreconditionedOperator:
    r""":math:`D A D` with D a diagonal (P,), not negative, here :math:`P^{-1/2}`; same spectrum as :math:`P^{-1} A`."""

    deterministic = True

    def __init__(self, operator: CurvatureOperator, scale: Tensor):
        self.operator, self.scale = operator, scale
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.rounding = operator.rounding

    @property
    def products(self) -> int:
        """How many products have been formed so far."""
        return self.operator.products

    def __matmul__(self, v: Tensor) -> Tensor:
        scale = self.scale if v.ndim == 1 else self.scale[:, None]
        return scale * (self.operator @ (scale * v.to(scale)))


def preconditioned(operator: CurvatureOperator, optimizer: torch.optim.Optimizer) -> PreconditionedOperator:
    r""":math:`P^{-1/2} A P^{-1/2}` with P from the present state of a torch optimiser of the same model.

    P as in the optimiser's next step: for Adam and AdamW :math:`(1-\beta_1^t)(\sqrt{v/(1-\beta_2^t)} + \epsilon)`,
    for Adamax :math:`(1-\beta_1^t) u`, for RMSprop and Adagrad :math:`\sqrt{v} + \epsilon`, for SGD the identity; each
    divided by :math:`\eta_i/\eta`, with :math:`\eta_i` the present rate of the parameter's group and :math:`\eta` the
    largest rate among the operator's parameters. Multiply all rates by c, and the matrix is the same.

    Raises
    ------
    ValueError
        If the optimiser is of another kind, does not hold a parameter of the operator, or has not stepped yet.
    """
    function = operator.point.function
    parameters = dict(function.model.named_parameters())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    diagonals, rates = [], []
    for name in function.names:
        p = parameters[name]
        if id(p) not in groups:
            raise ValueError(f"the optimiser does not hold parameter {name!r} of the operator")
        diagonals.append(_diagonal(optimizer, groups[id(p)], p, name))
        rates.append(_rate(optimizer, groups[id(p)], p))
    scale = flatten(diagonals).to(operator.device, operator.dtype).rsqrt()
    if len(set(rates)) > 1:
        shares = [torch.full_like(d, rate / max(rates)) for d, rate in zip(diagonals, rates, strict=True)]
        scale *= flatten(shares).to(scale).sqrt()
    return PreconditionedOperator(operator, scale)


def _rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: Tensor) -> float:
    """The learning rate of a parameter's next step, with the decay that Adagrad has of its own."""
    rate = float(group["lr"])
    if group.get("lr_decay"):
        rate /= 1 + float(optimizer.state[p]["step"]) * group["lr_decay"]
    return rate


def _diagonal(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: Tensor, name: str) -> Tensor:
    """The entries of P that belong to one parameter."""
    for kind, rule in _RULES.items():
        if isinstance(optimizer, kind):
            state = optimizer.state.get(p, {})
            if kind is not torch.optim.SGD and not state:
                raise ValueError(f"{type(optimizer).__name__} has no state for parameter {name!r}: take a step first")
            return rule(group, state, p.detach()).expand(p.shape)
    kinds = ", ".join(kind.__name__ for kind in _RULES)
    raise ValueError(f"no diagonal is known for {type(optimizer).__name__}; known are {kinds}")


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], p: Tensor) -> Tensor:
    (beta1, beta2), t = group["betas"], float(state["step"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return (1 - beta1**t) * ((second / (1 - beta2**t)).sqrt() + group["eps"])


def _adamax(group: Mapping[str, Any], state: Mapping[str, Any], p: Tensor) -> Tensor:
    return (1 - group["betas"][0] ** float(state["step"])) * state["exp_inf"]


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], p: Tensor) -> Tensor:
    second = state["square_avg"] - state["grad_avg"].square() if group["centered"] else state["square_avg"]
    return second.clamp_min(0).sqrt() + group["eps"]


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any], p: Tensor) -> Tensor:
    return state["sum"].sqrt() + group["eps"]


_RULES: dict[type[torch.optim.Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.SGD: lambda group, state, p: torch.ones_like(p),
}
