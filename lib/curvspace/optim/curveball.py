r"""CurveBall (paper C): a Newton step by one gradient-descent step a minibatch on the quadratic model.

With network :math:`\phi`, loss L on its outputs, Jacobian J of the outputs in the parameters w (as a matrix of
outputs by parameters), :math:`\hat G = J^\top H_L J + \lambda I` and gradient :math:`g = J^\top \nabla L`:

.. math::
    \Delta z &= J^\top (H_L J z + \nabla L) + \lambda z     && \text{(eq. 18)} \\
    z &\leftarrow \rho z - \beta \Delta z                   && \text{(eq. 15)} \\
    w &\leftarrow w + \alpha z                              && \text{(eq. 16)}

one forward-mode and one reverse-mode pass; the gradient is never formed alone. Rates that are ``"auto"``
minimise the quadratic model :math:`g^\top s + \tfrac12 s^\top\hat G s` over s in span(Δz, z) (eq. 19).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.curvature.left_behind import reads_calls_of
from curvspace.inner import inner
from curvspace.inputs import Inputs
from curvspace.losses import Loss
from curvspace.losses.recognised import plain_variables
from curvspace.optim.base import ModelOptimizer, require, require_count, require_flag, require_numbers
from curvspace.optim.forward_mode import ForwardMode, Linearised, linearise
from curvspace.seeds import replayed_randomness

Rate = float | Literal["auto"]


_CHECKED_STEPS = 3
"""The first has no velocity yet, and what compiles itself while it runs does so at one of the first calls."""


class CurveBall(ModelOptimizer):
    r"""Paper C's optimiser: ``loss = CurveBall(model).step(x, y)``.

    Parameters
    ----------
    loss
        ``"cross_entropy"``, ``"mse"``, ``CrossEntropy(label_smoothing=...)`` or any callable(outputs, targets).
    lr
        :math:`\alpha` of eq. 16; the optimum of the quadratic model is 1.
    rho, beta
        Fixed rates, or ``"auto"``: eq. 19, solved in float64. With both fixed there is no second forward-mode
        pass (except for the damping rule, where it is asked for, at the steps that apply it).
    damping
        :math:`\lambda` at the start; ``"auto"``: 1 with batch normalisation, 10 without (section 4).
    adapt_damping
        Every ``damping_interval`` steps, the first step included, compare on the same minibatch
        :math:`\gamma = (f(w + \alpha z) - f(w)) / \hat f(\alpha z)` with ``ratio_low`` and ``ratio_high``:
        above, :math:`\lambda` is multiplied by ``damping_factor``, below, divided.
    damping_factor
        The authors' programs use :math:`0.999^5` at every fifth step, the default; the paper's text has 0.999.
    damping_in_model
        Whether :math:`\hat f` contains :math:`\tfrac\lambda2 |z|^2`, as in the authors' programs (K-FAC
        implementations leave it out).
    weight_decay
        :math:`\mu`: adds :math:`\tfrac\mu2|w|^2` to f, hence :math:`\mu w` to g and :math:`\mu I` to
        :math:`\hat G`. The loss returned by ``step`` is without it.

    The first three steps, and those after modules or their modes have changed, also find out whether forward-mode
    products are those of the model's gradient, by a random u: :math:`u^\top(Jt) = (J^\top u)^\top t`. Where they are
    not (a model that computes under ``torch.no_grad()``, a wrong forward-mode rule), and for TorchScript and layers
    without a forward-mode rule, :math:`Jt` comes by double backward. ``costs`` leave these two passes a step out.

    ``log()`` gives rho, beta, damping, ratio (:math:`\gamma`, of the latest check) and anomalies: how many steps
    had a non-finite solution of eq. 19 (then :math:`\rho = 0`) or a non-finite ratio (then :math:`\lambda` stays).
    Raises ``ValueError`` for a bad hyper-parameter, for a second param group, and at a step for a layer that has
    neither forward-mode nor second derivatives.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        lr: float = 1.0,
        rho: Rate = "auto",
        beta: Rate = "auto",
        damping: Rate = 1.0,
        adapt_damping: bool = True,
        *,
        damping_factor: float = 0.999**5,
        damping_interval: int = 5,
        ratio_low: float = 0.5,
        ratio_high: float = 1.5,
        damping_in_model: bool = True,
        weight_decay: float = 0.0,
    ):
        require_numbers(
            lr=lr, damping_factor=damping_factor, ratio_low=ratio_low, ratio_high=ratio_high, weight_decay=weight_decay
        )
        require(lr > 0, "lr", lr, "positive")
        require(_is_rate(rho), "rho", rho, "'auto' or a number of at least 0")
        require(_is_rate(beta), "beta", beta, "'auto' or a number of at least 0")
        require(_is_rate(damping), "damping", damping, "'auto' or a number of at least 0")
        require(0 < damping_factor <= 1, "damping_factor", damping_factor, "in (0, 1]")
        require_count("damping_interval", damping_interval)
        require(ratio_low <= ratio_high, "ratio_low", ratio_low, f"at most ratio_high = {ratio_high}")
        require(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")
        require_flag("adapt_damping", adapt_damping)
        require_flag("damping_in_model", damping_in_model)
        defaults = {
            "lr": lr,
            "rho": rho,
            "beta": beta,
            "weight_decay": weight_decay,
            "adapt_damping": adapt_damping,
            "damping_factor": damping_factor,
            "damping_interval": damping_interval,
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
            "damping_in_model": damping_in_model,
        }
        super().__init__(model, defaults, loss)
        self._way: type[Linearised] = ForwardMode
        self._checked: list[tuple[nn.Module, bool]] = []
        self._phase: list[Any] = []
        self._to_check = 0
        start = (1.0 if _has_batch_norm(model) else 10.0) if damping == "auto" else damping
        nan = float("nan")
        self._load_extra_state({"damping": start, "rho": nan, "beta": nan, "ratio": nan, "anomalies": 0})

    @property
    def damping(self) -> float:
        """The present λ."""
        return float(self._scalars["damping"])

    def log(self) -> dict[str, float]:
        values = torch.stack(list(self._scalars.values())).tolist()  # one transfer from the device, not five
        return dict(zip(self._scalars, values, strict=True))

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        group = self.param_groups[0]
        parameters = group["params"]
        velocity = [self._velocity(p) for p in parameters]
        damping, decay = self._scalars["damping"], group["weight_decay"]
        check = group["adapt_damping"] and self.steps % group["damping_interval"] == 0

        share = self.ranks.share(self.loss, inputs, targets, parameters[0].device)
        with self.evaluating():
            point = self._linearised(inputs, targets, velocity)
        outputs, of_outputs = point.outputs.detach(), self._loss_of(point)
        again = partial(replayed_randomness, outputs.device)  # each evaluation of the loss has the same draws
        with self.evaluating(), again(), of_outputs.at_rest():
            loss, slope = self._value_and_slope(of_outputs, outputs, targets)
        with again():
            curved_z = of_outputs.hessian_product(outputs, targets, point.first)
        loss, *pulled = self.ranks.mean([loss, *point.pull(curved_z + slope)], share)
        delta = self._direction(pulled, velocity)

        quadratic = None
        if check or "auto" in (group["rho"], group["beta"]):
            with self.evaluating():
                along = (point.push(delta), point.first)
            self.costs.jvp += 1
            with again():
                curved = (of_outputs.hessian_product(outputs, targets, along[0]), curved_z)
            products = self.ranks.mean(_output_products(along, curved, slope), share)
            quadratic = _restrict(delta, velocity, parameters, products, damping, decay)
        rho, beta = self._rates(quadratic, torch.finfo(outputs.dtype).eps)

        with torch.no_grad():
            torch._foreach_mul_(velocity, rho.to(velocity[0].dtype))
            torch._foreach_mul_(delta, beta.to(velocity[0].dtype))
            torch._foreach_sub_(velocity, delta)
            if check and quadratic is not None:
                decayed = _decay_change(parameters, velocity, group["lr"], decay)
            torch._foreach_add_(parameters, velocity, alpha=group["lr"])
            if check and quadratic is not None:
                with self.evaluating():
                    replayed = point.replay()
                with self.evaluating(), again(), of_outputs.at_rest():
                    after = of_outputs(replayed, targets)
                (after,) = self.ranks.mean([after], share)
                change = after.double() - loss.double() + decayed
                self.costs.forward += 1
                self._adapt_damping(change, quadratic.value(-beta, rho, group["lr"], group["damping_in_model"]))
        self._move_loss(point.unpack(outputs), targets)
        self.costs.forward += 1
        self.costs.backward += 1
        self.costs.jvp += 1
        self.costs.products += 1
        return loss

    def _linearised(self, inputs: Inputs, targets: Any, velocity: list[Tensor]) -> Linearised:
        """By dual numbers where they serve: found out anew when modules or modes have changed."""
        modules, phase = self._modules(), plain_variables(vars(self.loss).get("_function"))
        if (modules, phase) != (self._checked, self._phase):
            if reads_calls_of(self.model, self.loss, inputs, targets):
                raise ValueError(_no_function_of_outputs(self.loss.name))
            self._phase = phase
        if modules != self._checked:
            self._way, self._checked, self._to_check = ForwardMode, modules, _CHECKED_STEPS
        point = linearise(self.model, inputs, velocity, self._way, self.loss.outputs, self._to_check > 0)
        self._way, self._to_check = type(point), max(self._to_check - 1, 0)
        return point

    def _loss_of(self, point: Linearised) -> Loss:
        """The loss as a function of the outputs as one tensor."""
        return self.loss if self.loss.closed_form else _OfOneTensor(self.loss, point.unpack)

    def _value_and_slope(self, loss: Loss, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        r"""L and :math:`\nabla L` in the outputs, in which alone eq. 18 differentiates it."""
        if loss.closed_form:
            return loss(outputs, targets).detach(), loss.gradient(outputs, targets)
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            value = loss(z, targets)
            slope, *own = torch.autograd.grad(value, [z, *self._trainable], allow_unused=True)
        if slope is None or any(g is not None for g in own):
            raise ValueError(_no_function_of_outputs(self.loss.name))
        return value.detach(), slope

    def _velocity(self, parameter: Tensor) -> Tensor:
        """z of one parameter, zero at the start."""
        state = self.state[parameter]
        if "z" not in state:
            state["z"] = torch.zeros_like(parameter)
        return state["z"]

    def _direction(self, pulled: list[Tensor], velocity: list[Tensor]) -> list[Tensor]:
        r"""Paper C, eq. 18: :math:`\Delta z = J^\top(H_L J z + \nabla L) + \lambda z` (+ :math:`\mu (z + w)`).

        ``pulled`` is its first term; it may share memory between parameters, and is not changed in place.
        """
        decay = self.param_groups[0]["weight_decay"]
        shift = (self._scalars["damping"] + decay).to(velocity[0].dtype)
        delta = list(torch._foreach_add(torch._foreach_mul(velocity, shift), pulled))
        if decay:
            torch._foreach_add_(delta, [p.detach() for p in self.param_groups[0]["params"]], alpha=decay)
        return delta

    def _rates(self, quadratic: _Quadratic | None, eps: float) -> tuple[Tensor, Tensor]:
        """ρ and β for this step, float64 on the device."""
        group, scalars = self.param_groups[0], self._scalars
        rho, beta = (
            None if group[name] == "auto" else torch.full_like(scalars["rho"], group[name]) for name in ("rho", "beta")
        )
        if rho is None or beta is None:
            assert quadratic is not None
            rho, beta, anomaly = quadratic.minimise(rho, beta, eps)
            scalars["anomalies"] += anomaly
        scalars["rho"], scalars["beta"] = rho, beta
        return rho, beta

    def _adapt_damping(self, change: Tensor, predicted: Tensor) -> None:
        """The trust-region rule of section 3, without a branch on the host."""
        group, scalars = self.param_groups[0], self._scalars
        ratio = change / predicted
        finite = ratio.isfinite()
        scalars["anomalies"] += ~finite
        scalars["ratio"] = ratio
        damping = scalars["damping"]
        damping = torch.where(finite & (ratio > group["ratio_high"]), damping * group["damping_factor"], damping)
        low = finite & (ratio < group["ratio_low"])
        scalars["damping"] = torch.where(low, damping / group["damping_factor"], damping)

    def _extra_state(self) -> dict[str, Any]:
        return dict(self.log())

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        self._scalars = {
            name: torch.tensor(float(state[name]), dtype=torch.float64, device=device)
            for name in ("rho", "beta", "damping", "ratio", "anomalies")
        }


def _no_function_of_outputs(loss: str) -> str:
    return (
        f"the loss {loss} reads the model's parameters itself (a penalty?), or what a call of it leaves behind (an "
        "auxiliary loss, a hook's features), or not its outputs; CurveBall needs a function of the outputs: use "
        "weight_decay for a penalty, and return from the model what else the loss takes"
    )


class _OfOneTensor(Loss):
    """A loss of outputs that ``unpack`` makes of one tensor."""

    def __init__(self, loss: Loss, unpack: Callable[[Tensor], Any]):
        self.inner, self.unpack, self.name, self.stateful = loss, unpack, loss.name, loss.stateful

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self.inner(self.unpack(outputs), targets)

    def at_rest(self, apart_from: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
        return self.inner.at_rest(apart_from)


class _Quadratic:
    r"""The quadratic model restricted to :math:`s = x_1 \Delta z + x_2 z`: :math:`b^\top x + \tfrac12 x^\top A x`.

    ``a`` holds A's entries 11, 12, 22 and ``b`` its two, ``norms`` the damping's part of A; all float64, on the
    device.
    """

    def __init__(self, a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor], norms: tuple[Tensor, ...]):
        self.a, self.b, self.norms = a, b, norms

    def minimise(self, rho: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""(ρ, β) of eq. 19, those given being kept, and whether the solution had to be replaced.

        The system is scaled to a unit diagonal. Nearly singular (Δz parallel to z, to the parameters' accuracy),
        it is solved by the pseudo-inverse. At the first step z = 0, and :math:`\rho = 0`,
        :math:`\beta = g^\top\Delta z / \Delta z^\top\hat G\Delta z`. Where the solution is not finite, ρ = 0 and
        that β serve, or β = 0 if it is not finite either.
        """
        (a11, a12, a22), (b1, b2) = self.a, self.b
        zero = torch.zeros_like(a11)
        first = b1 / a11
        if beta is not None:  # the minimum over x_2 = ρ at x_1 = -β
            solution = (-beta, torch.where(a22 > 0, (a12 * beta - b2) / a22, zero))
        elif rho is not None:
            solution = (torch.where(a11 > 0, -(b1 + a12 * rho) / a11, zero), rho)
        else:
            solution = _solve_scaled(self.a, self.b, 8 * eps)
        x1, x2 = solution
        finite = x1.isfinite() & x2.isfinite()
        safe = torch.where(first.isfinite(), first, zero) if beta is None else beta
        return torch.where(finite, x2, zero if rho is None else rho), torch.where(finite, -x1, safe), ~finite

    def value(self, x1: Tensor, x2: Tensor, lr: float, with_damping: bool) -> Tensor:
        r"""The change :math:`\hat f(\alpha s)` that the model predicts, with or without the damping's part."""
        a11, a12, a22 = self.a if with_damping else (a - n for a, n in zip(self.a, self.norms, strict=True))
        linear = self.b[0] * x1 + self.b[1] * x2
        return lr * linear + 0.5 * lr**2 * (a11 * x1**2 + 2 * a12 * x1 * x2 + a22 * x2**2)


def _solve_scaled(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor], tol: float) -> tuple[Tensor, Tensor]:
    """The minimum of bᵀx + xᵀAx/2 for a positive semi-definite 2×2 A, by the pseudo-inverse where needed."""
    a11, a12, a22 = a
    r1, r2 = (torch.where(d > 0, d.rsqrt(), torch.zeros_like(d)) for d in (a11, a22))
    c, v1, v2 = a12 * r1 * r2, b[0] * r1, b[1] * r2
    determinant = 1 - c**2
    along = (v1 + c.sign() * v2) / (2 * (1 + c.abs()))  # in the eigenvector (1, sign c) of eigenvalue 1 + |c|
    singular = determinant <= tol
    x1 = torch.where(singular, along, (v1 - c * v2) / determinant)
    x2 = torch.where(singular, c.sign() * along, (v2 - c * v1) / determinant)
    return -x1 * r1, -x2 * r2


def _output_products(along: tuple[Tensor, Tensor], curved: tuple[Tensor, Tensor], slope: Tensor) -> list[Tensor]:
    r"""The parts of eq. 19 that come from the outputs: 11, 12 and 22 of its matrix, then its right-hand side.

    ``along`` is :math:`(J\Delta z, J z)`, ``curved`` the two times :math:`H_L`, ``slope`` :math:`\nabla L`.
    """
    pairs = ((along[0], curved[0]), (along[1], curved[0]), (along[1], curved[1]), (slope, along[0]), (slope, along[1]))
    return [_dot([u], [v]) for u, v in pairs]


def _restrict(
    delta: list[Tensor],
    velocity: list[Tensor],
    parameters: list[Tensor],
    products: list[Tensor],
    damping: Tensor,
    decay: float,
) -> _Quadratic:
    """Eq. 19's matrix and right-hand side, from :func:`_output_products` and dot products of parameters."""
    norms = (_dot(delta, delta), _dot(delta, velocity), _dot(velocity, velocity))
    a = tuple(product + (damping + decay) * n for product, n in zip(products[:3], norms, strict=True))
    b = tuple(products[3:])
    if decay:
        b = tuple(v + decay * _dot(parameters, direction) for v, direction in zip(b, (delta, velocity), strict=True))
    return _Quadratic((a[0], a[1], a[2]), (b[0], b[1]), tuple(damping * n for n in norms))


@torch.no_grad()
def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, summed in float64."""
    parts = [inner(u.reshape(-1), v.reshape(-1)).double() for u, v in zip(a, b, strict=True)]
    return torch.stack(parts).sum()


def _decay_change(parameters: list[Tensor], velocity: list[Tensor], lr: float, decay: float) -> Tensor | float:
    """The change of μ|w|²/2 when w moves by αz."""
    if not decay:
        return 0.0
    return decay * lr * (_dot(parameters, velocity) + 0.5 * lr * _dot(velocity, velocity))


def _is_rate(value: object) -> bool:
    return value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
