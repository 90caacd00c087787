r"""Any optimiser of torch, and a step along a running estimate of the most negative curvature (paper D, appendix C).

With g and H the gradient and the Hessian of one minibatch's loss, and a unit vector :math:`\tilde v`,

.. math::
    \tilde\lambda = \tilde v^\top H \tilde v, \qquad
    \theta \leftarrow \mathrm{base}(\theta, g) - \eta_-\,(g^\top \tilde v)\,\tilde v, \qquad
    \tilde v \leftarrow \frac{\tilde v - \eta_v\, 2 H \tilde v}{|\tilde v - \eta_v\, 2 H \tilde v|},

since :math:`\nabla_v\, v^\top H v = 2Hv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.curvature.as_written import plain_kernels
from curvspace.curvature.second_order import SecondOrderLayers
from curvspace.differentiation import pull_back, require_second_derivatives
from curvspace.functional import add_to_parameters, flatten, unflatten
from curvspace.inner import inner, norm
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss
from curvspace.optim.base import require, require_count, require_numbers
from curvspace.optim.first_order import FirstOrder, laid_out_as

# Without a given learning rate for v: how fast the scale |Hv| that it is divided by is forgotten, per product. Faster
# forgetting (0.99) lets sharp minibatches push v towards positive curvature again and again.
_SCALE_DECAY = 0.999


class NegativeCurvature(FirstOrder):
    r"""``NegativeCurvature(model, base=torch.optim.RMSprop, lr=3.6e-4, lr_negative=0.1, every=1).step(x, y)``.

    Paper D, appendix C: its authors proposed this and did not try it. They leave open what we had to choose:

    - Both updates of a step use one minibatch and one gradient, taken before the base's update: the Hessian
      product shares its forward pass, and the second update costs no pass of its own.
    - The second update is made only while the running :math:`\tilde\lambda` is negative: before the estimate
      has found negative curvature, :math:`\tilde v` is any direction.

    On minibatches the estimate is poor (D-X1 measures it): the top curvature, which bounds the rate, is a hundred
    times the bottom one, and the bottom direction turns faster than so small a rate can follow.

    Parameters
    ----------
    model
        Its trainable parameters are optimised. In training mode, batch statistics and dropout are those of the
        step's own forward pass, in the gradient and in the product alike.
    base
        The class of an optimiser that steps without a closure, or its name in ``torch.optim``; ``base_options``
        (``lr``, ``momentum``, ...) are passed on, and schedulers act on its ``lr``.
    lr_v
        :math:`\eta_v`. ``"auto"``: :math:`1/(4s)` with s the largest recent :math:`|H\tilde v|`, a lower bound of
        the spectral radius that grows whenever the positive end of the spectrum takes over :math:`\tilde v`.
    lr_negative
        :math:`\eta_-`, per unit of gradient.
    every
        A product and a second update at each ``every``-th step only (the first among them).
    average
        :math:`\tilde\lambda` is the exponential mean of the minibatch values with this weight on the past.
    seed
        Of the first :math:`\tilde v`, uniform on the sphere.

    Raises
    ------
    ValueError
        For a hyper-parameter out of its range, or a base that is no optimiser class.
    RuntimeError
        At a step, for a model or loss with a function that is ``once_differentiable``.
    """

    couples_parameters = True

    def __init__(
        self,
        model: nn.Module,
        base: type[torch.optim.Optimizer] | str = torch.optim.RMSprop,
        *,
        lr_v: float | str = "auto",
        lr_negative: float = 0.1,
        every: int = 1,
        average: float = 0.9,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        seed: int = 0,
        **base_options: Any,
    ):
        kind: Any = getattr(torch.optim, base, None) if isinstance(base, str) else base
        known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        require(known, "base", base, "an optimiser class or its name in torch.optim")
        require(kind is not torch.optim.LBFGS, "base", base, "an optimiser that steps without a closure")
        require(not base_options.get("maximize"), "maximize", True, "False: negative curvature leads downwards")
        require_numbers(lr_negative=lr_negative, average=average)
        positive = isinstance(lr_v, int | float) and math.isfinite(lr_v) and lr_v > 0
        require(positive or lr_v == "auto", "lr_v", lr_v, '"auto" or a positive number')
        require(math.isfinite(lr_negative) and lr_negative >= 0, "lr_negative", lr_negative, "finite and at least 0")
        require("groups" not in base_options, "groups", base_options.get("groups"), "left out: there is one group")
        require_count("every", every)
        require(0.0 <= average < 1.0, "average", average, "in [0, 1)")
        super().__init__(model, kind, loss, **base_options)
        self.param_groups[0].update(lr_v=lr_v, lr_negative=lr_negative, every=every, average=average)
        self._checked: list[tuple[nn.Module, bool]] = []
        self._v = self._random_direction(seed)
        self._value = self._v.new_tensor(math.nan)
        self._scale = self._v.new_tensor(0.0)

    @property
    def direction(self) -> Tensor:
        r""":math:`\tilde v`, the running estimate of the most negative eigenvector: a unit vector (P,)."""
        return self._v

    @property
    def curvature(self) -> float:
        r""":math:`\tilde\lambda`, the running mean of :math:`\tilde v^\top H \tilde v`; NaN before a product."""
        return float(self._value)

    def _random_direction(self, seed: int) -> Tensor:
        like = self.param_groups[0]["params"]
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same vector
        size = sum(p.numel() for p in like)
        v = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(like[0])
        return v / norm(v)

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        group = self.param_groups[0]
        if self.steps % group["every"] != 0:
            with self.evaluating():
                return super()._step(inputs, targets)
        with self.evaluating():
            loss, gradients, product = self._gradient_and_product(inputs, targets)
        for p, g in zip(group["params"], gradients, strict=True):
            p.grad = None if g is None else laid_out_as(p, g)
        gradient = flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"])
        self.grad_norm = norm(gradient)
        slope = inner(gradient, self._v)
        self._measure(product)
        self.inner.step()
        if group["lr_negative"] > 0:
            taken = (self._value < 0) & torch.isfinite(slope)
            add_to_parameters(self.model, torch.where(taken, -group["lr_negative"] * slope, 0.0) * self._v)
        self._improve(product)
        return loss

    def _gradient_and_product(self, inputs: Inputs, targets: Tensor) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Loss, gradient by parameter (None where the loss does not depend on it), Hv (P,): one forward pass."""
        parameters = self.param_groups[0]["params"]
        with plain_kernels(self.model.modules()):  # fused ones have no second derivative
            with SecondOrderLayers():
                loss = self.loss(call(self.model, inputs), targets)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            unchecked = self._require_second_derivatives(gradients)
            curved = [
                (g, t)
                for g, t in zip(gradients, unflatten(self._v, parameters), strict=True)
                if g is not None and g.requires_grad  # a gradient that is constant in theta adds nothing to Hv
            ]
            if curved:
                g, t = zip(*curved, strict=True)
                product = pull_back(g, parameters, t, materialize_grads=True)
            else:
                product = tuple(torch.zeros_like(p) for p in parameters)
            if unchecked and _finite(gradients) and not _finite(product):
                self._checked = []
                raise RuntimeError(
                    f"a product with the Hessian of {type(self.model).__name__} is not finite, though its gradient is: "
                    "an operation has no second derivative here; NegativeCurvature needs one: replace it"
                )
        share = self.ranks.share(self.loss, inputs, targets, loss.device)
        used = self.ranks.any([g is not None for g in gradients], loss.device)
        known = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, parameters, strict=True)]
        value, hv, *known = self.ranks.mean([loss.detach(), flatten(product), *known], share)
        self.costs.forward += 1
        # The product differentiates the forward and the backward pass once more: about two backward passes.
        self.costs.backward += 3
        self.costs.products += 1
        return value, [g if u else None for g, u in zip(known, used, strict=True)], hv

    def _require_second_derivatives(self, gradients: Sequence[Tensor | None]) -> bool:
        """Look through the graph at the first product, and when the modules or their modes have changed: whether so."""
        modules = self._modules()
        if modules == self._checked:
            return False
        require_second_derivatives(gradients, "; NegativeCurvature needs one: replace it")
        self._checked = modules
        return True

    # What follows stays on the device: a step must not wait for a number to reach the host.

    def _measure(self, product: Tensor) -> None:
        """Average the minibatch's vᵀHv into the running value; an overflowing minibatch is left out."""
        value, average = inner(self._v, product), self.param_groups[0]["average"]
        mean = torch.where(torch.isnan(self._value), value, average * self._value + (1 - average) * value)
        self._value = torch.where(torch.isfinite(value), mean, self._value)

    def _improve(self, product: Tensor) -> None:
        """One gradient step of v on vᵀHv, renormalised; a zero or overflowing product says nothing."""
        length = norm(product)
        useful = torch.isfinite(length) & (length > 0)
        self._scale = torch.where(useful, torch.maximum(_SCALE_DECAY * self._scale, length), self._scale)
        rate = self.param_groups[0]["lr_v"]
        v = self._v - 2 * (1 / (4 * self._scale) if rate == "auto" else rate) * product
        self._v = torch.where(useful, v / norm(v), self._v)

    def log(self) -> dict[str, Any]:
        return {"curvature_estimate": self._value}

    def _extra_state(self) -> dict[str, Any]:
        return {"v": self._v, "value": self._value, "scale": self._scale}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self._v, self._value, self._scale = (state[key].to(self._v) for key in ("v", "value", "scale"))


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)
