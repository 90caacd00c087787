r"""Levenberg–Marquardt on the Gauss-Newton matrix, for models small enough to form it.

.. math:: (\hat H + \lambda D)\, d = -g, \qquad w \leftarrow w + \alpha d \ \text{ if } f(w + \alpha d) < f(w)

with :math:`\hat H = J^\top H_L J` (paper C, eq. 4 and 8) and D the identity (Levenberg) or
:math:`\mathrm{diag}(\hat H)` (Marquardt).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvspace.curvature.dense import MAX_DENSE, dense_matrix
from curvspace.differentiation import without_graph
from curvspace.functional import add_to_parameters, assign_parameters, parameter_vector, trainable_parameters
from curvspace.inner import norm
from curvspace.inputs import Inputs, call
from curvspace.losses import Loss
from curvspace.objective import Objective
from curvspace.optim.base import ModelOptimizer, require, require_numbers


class LevenbergMarquardt(ModelOptimizer):
    r"""``loss = LevenbergMarquardt(model, loss="mse").step(x, y)``: one proposal, taken or refused.

    A proposal that lowers the loss on the same minibatch is taken and :math:`\lambda` is multiplied by ``down``;
    otherwise the parameters stay and :math:`\lambda` is multiplied by ``up``. A step costs P Gauss-Newton products
    and a P × P system, so P is limited to 5,000. Dropout is off; running statistics move once a step.

    Parameters
    ----------
    damping
        :math:`\lambda` at the start.
    minimum, maximum
        Bounds of :math:`\lambda`: from outside of them it would not come back in any number of steps that one has.
    scaling
        D: ``"identity"`` or ``"diagonal"``.

    ``log()`` gives damping, and accepted: 1.0 or 0.0 for the latest proposal.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "mse",
        lr: float = 1.0,
        damping: float = 1.0,
        up: float = 10.0,
        down: float = 0.1,
        scaling: Literal["identity", "diagonal"] = "identity",
        minimum: float = 1e-12,
        maximum: float = 1e6,
    ):
        require_numbers(lr=lr, damping=damping, up=up, down=down, minimum=minimum, maximum=maximum)
        require(lr > 0, "lr", lr, "positive")
        require(damping > 0, "damping", damping, "positive")
        require(0 < minimum <= damping, "minimum", minimum, f"positive and at most damping = {damping}")
        require(damping <= maximum < math.inf, "maximum", maximum, f"finite and at least damping = {damping}")
        require(up > 1, "up", up, "above 1")
        require(0 < down <= 1, "down", down, "in (0, 1]")
        require(scaling in ("identity", "diagonal"), "scaling", scaling, "'identity' or 'diagonal'")
        size = sum(p.numel() for p in trainable_parameters(model).values())
        require(size <= MAX_DENSE, "the number of parameters", size, f"at most {MAX_DENSE}: the matrix is formed")
        super().__init__(model, {"lr": lr, "up": up, "down": down, "scaling": scaling}, loss)
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.damping = float(damping)
        self.accepted = False

    def log(self) -> dict[str, float]:
        return {"damping": self.damping, "accepted": float(self.accepted)}

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        group = self.param_groups[0]
        objective = Objective(self.model, [(inputs, targets)], self.loss, microbatch=None, group=self.ranks.group)
        before, start = objective.loss(), parameter_vector(self.model)
        direction = self._direction(objective, group["scaling"])
        outputs = self._training_pass(inputs)
        add_to_parameters(self.model, direction, group["lr"])
        after = objective.loss()
        self.accepted = after < before
        if not self.accepted:  # NaN and inf included
            assign_parameters(self.model, start)
        self.damping = self._bounded(self.damping * (group["down"] if self.accepted else group["up"]))
        if outputs is not None:
            self._move_loss(outputs, targets)
        self.costs.forward += 3
        return start.new_tensor(before)

    def _bounded(self, damping: float) -> float:
        return min(max(damping, self.minimum), self.maximum)

    def _direction(self, objective: Objective, scaling: str) -> Tensor:
        """The proposal (P,), solved in float64."""
        gradient = objective.gradient()
        self.grad_norm = norm(gradient)
        matrix = dense_matrix(objective.gauss_newton())
        size = matrix.shape[0]
        self.costs.backward += 1 + size
        self.costs.jvp += size
        self.costs.products += size
        weights = matrix.diagonal() if scaling == "diagonal" else torch.ones(size, dtype=matrix.dtype, device="cpu")
        damped = matrix + self.damping * torch.diag(weights)
        solution = torch.linalg.lstsq(damped, -gradient.double().cpu()[:, None]).solution[:, 0]
        return solution.to(gradient)

    def _training_pass(self, inputs: Inputs) -> Any:
        """The outputs before the step, if what layers or the loss keep is to move, as an objective leaves it; else
        None."""
        norms = (isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in self.model.modules())
        if any(norms) or self.loss.stateful:
            return without_graph(lambda: call(self.model, inputs))
        return None

    def _extra_state(self) -> dict[str, Any]:
        return {"damping": self.damping, "accepted": self.accepted}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self.damping, self.accepted = self._bounded(state["damping"]), state["accepted"]
