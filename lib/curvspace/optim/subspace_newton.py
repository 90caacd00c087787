r"""One optimiser for all: any basis, any rule within its span, any rule outside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.functional import add_to_parameters
from curvspace.inner import norm
from curvspace.inputs import Inputs
from curvspace.losses import Loss
from curvspace.optim.base import ModelOptimizer, copied, require, require_count
from curvspace.optim.bases import Basis
from curvspace.optim.damping import AdaptiveDamping
from curvspace.optim.inside import Inside
from curvspace.optim.minibatch import Minibatch
from curvspace.optim.outside import Outside, incoming_weight


class SubspaceNewton(ModelOptimizer):
    r"""Steps that are split by a basis Q (P, k) of a small subspace:

    .. math:: \theta \leftarrow \theta - d, \qquad
              d = Q\,\mathrm{inside}(Q^\top g) + \mathrm{outside}(g - QQ^\top g).

    Where Q is orthonormal the two parts are orthogonal. Paper A's unit class gradients are not; with Q = V the same
    formula is its eq. 15.

    Parameters
    ----------
    model
        Called as ``model(x)``, ``model(*x)`` or ``model(**x)`` by the form of the inputs, in its present mode.
    basis, inside, outside
        See :mod:`~curvspace.optim.bases`, :mod:`~curvspace.optim.eigenbases`, :mod:`~curvspace.optim.inside`,
        :mod:`~curvspace.optim.outside`. They hold state: one instance serves one optimiser.
    loss
        ``"cross_entropy"``, ``"mse"`` or a callable(outputs, targets) -> mean loss.
    momentum_on
        ``"cospace"``: the outside rule's own momentum, on its part alone. ``"step"``: on the whole step (how we read
        paper A), :math:`b \leftarrow \mu b + (1 - \tau)\,d,\; \theta \leftarrow \theta - b`, with the outside
        rule's momentum :math:`\mu` and dampening :math:`\tau`; b is d at first.
    refresh_every
        Steps between refreshes of the basis and of the curvature in it (default: the basis's own wish, else 1).
    first_refresh
        The step (from 0) of the first refresh; before it all of the gradient goes to the outside rule.
    lr
        Overrides the outside rule's learning rate, which otherwise is the param group's.

    Raises
    ------
    ValueError
        For a hyper-parameter out of range, or one that does not fit the others.
    """

    def __init__(
        self,
        model: nn.Module,
        basis: Basis,
        inside: Inside,
        outside: Outside,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        momentum_on: Literal["cospace", "step"] = "cospace",
        refresh_every: int | None = None,
        lr: float | None = None,
        first_refresh: int = 0,
    ):
        require(momentum_on in ("cospace", "step"), "momentum_on", momentum_on, '"cospace" or "step"')
        require_count("refresh_every", refresh_every, optional=True)
        require_count("first_refresh", first_refresh, 0)
        require(lr is None or lr >= 0, "lr", lr, "at least 0")
        if momentum_on == "step" and not outside.heavy_ball:
            raise ValueError(f"momentum_on='step' needs an outside rule with momentum, got {type(outside).__name__}")
        defaults = {**outside.defaults, **({} if lr is None else {"lr": lr})}
        super().__init__(model, {**defaults, "built_lr": float(defaults["lr"])}, loss)
        self.basis, self.inside, self.outside = basis, inside, outside
        self.momentum_on = momentum_on
        self.refresh_every = refresh_every or getattr(basis, "refresh_every", None) or 1
        self.first_refresh = first_refresh
        self._buffer: Tensor | None = None
        self._log: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A group that was saved before one of its entries was known has that of this optimiser."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        group = self.param_groups[0]
        batch = Minibatch(
            self.model, self.loss, inputs, targets, self.costs, ranks=self.ranks, evaluating=self.evaluating
        )
        since = self.steps - self.first_refresh
        refresh = since >= 0 and since % self.refresh_every == 0
        if refresh and self.basis.span is not None:
            with torch.no_grad():
                self.inside.leave(self.basis.span)
        observed = self.basis.observe(batch, refresh)
        with torch.no_grad():
            if refresh and self.basis.span is not None:
                self.inside.refresh(self.basis.span, batch, observed)
                self.inside.enter(self.basis.span)
                self.outside.moved(self.basis.span)
            update = self._update(batch, observed.loss, observed.gradient, group)
            self.basis.record(update if self.outside.proposed is None else self.outside.proposed)
        return observed.loss

    def _update(self, batch: Minibatch, loss: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Take the step; returns what was subtracted from the parameters (P,)."""
        self.grad_norm = norm(gradient)
        group = dict(group)
        momentum = group["momentum"]
        if self.momentum_on == "step":
            group["momentum"] = 0.0
        span = self.basis.span
        if span is None:  # no direction known yet: all of it is orthogonal complement
            step, taken = self.outside.step(gradient, group, None), None
        else:
            coordinates = span.coordinates(gradient)
            coefficients, inner = self._within(coordinates, group)
            rest = gradient if self.outside.whole else gradient - span.combine(coordinates)
            step = self.outside.step(rest, group, span) + inner
            taken = self._judge(batch, loss, coordinates, coefficients, inner)
            self._log = {"span_share": (coordinates / self.grad_norm).square().sum(), **self.inside.log()}
        if self.momentum_on == "step" and momentum > 0:
            weight = incoming_weight(momentum, group["dampening"])
            self._buffer = (
                step.clone() if self._buffer is None else self._buffer.mul_(momentum).add_(step, alpha=weight)
            )
            step = self._buffer
        add_to_parameters(self.model, step if taken is None else step - taken, alpha=-1.0)
        return step

    def _within(self, coordinates: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Coefficients (k,) of the step in the span and the step itself (P,), cut to the trust radius."""
        span = self.basis.span
        assert span is not None
        coefficients = self.inside.coefficients(coordinates, group)
        inner = span.combine(coefficients)
        if self.inside.trust_radius is not None:
            factor = (self.inside.trust_radius / torch.linalg.vector_norm(inner)).clamp_max(1.0).nan_to_num(nan=1.0)
            coefficients, inner = factor * coefficients, factor * inner
        return coefficients, inner

    def _judge(
        self, batch: Minibatch, loss: Tensor, coordinates: Tensor, coefficients: Tensor, inner: Tensor
    ) -> Tensor | None:
        """If the rule asks, take the step in the span first and tell it what came of it; returns what was taken.

        Both losses see the same dropout masks, and what the loss keeps as it is now, for which the one before is
        evaluated anew.
        """
        if not self.inside.due():
            return None
        before = batch.loss_now() if batch.drew() or self.loss.stateful else loss
        add_to_parameters(self.model, inner, alpha=-1.0)
        self.inside.judge(coordinates, coefficients, before - batch.loss_now())
        return inner

    def log(self) -> dict[str, Any]:
        """``span_share``: :math:`|Q^\\top g|^2/|g|^2` (above 1 is possible where Q is not orthonormal); damping."""
        return self._log

    def _made_of(self) -> dict[str, Any]:
        rules = {"inside": type(self.inside).__name__, "outside": type(self.outside).__name__}
        return {**super()._made_of(), "basis": self.basis.made_of(), **rules, "type": str(self._trainable[0].dtype)}

    def _extra_state(self) -> dict[str, Any]:
        parts = {"basis": self.basis.state, "inside": self.inside.state, "outside": self.outside.state}
        damping = getattr(self.inside, "damping", None)
        if isinstance(damping, AdaptiveDamping):
            parts["damping"] = damping.state
        return copied({**parts, "buffer": self._buffer})

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        loaded = copied(state, device)
        self.inside.state, self.outside.state = loaded["inside"], loaded["outside"]
        if "damping" in loaded:
            self.inside.damping.state = loaded["damping"]  # type: ignore[attr-defined]
        self._buffer = loaded["buffer"]
        self.basis.load(loaded["basis"])
