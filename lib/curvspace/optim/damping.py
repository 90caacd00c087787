"""Damping adapted by how well the quadratic model predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvspace.optim.base import require, require_count, require_numbers


class AdaptiveDamping:
    r"""Levenberg-Marquardt rule on :math:`\rho` = actual / predicted reduction of the minibatch loss.

    Every ``every`` steps: :math:`\rho > 3/4` multiplies :math:`\delta` by ``factor`` (< 1), :math:`\rho < 1/4` divides
    by it; in between it stays. Each test costs one forward pass.
    """

    def __init__(
        self, initial: float = 0.1, factor: float = 0.8, every: int = 5, minimum: float = 1e-4, maximum: float = 1e4
    ):
        require_numbers(initial=initial, factor=factor, minimum=minimum, maximum=maximum)
        require(0 < minimum <= initial <= maximum, "initial", initial, f"in [{minimum}, {maximum}], minimum > 0")
        require(0 < factor < 1, "factor", factor, "in (0, 1)")
        require_count("every", every)
        self.initial, self.factor, self.every = initial, factor, every
        self.minimum, self.maximum = minimum, maximum
        self.state: dict[str, Any] = {"steps": 0}

    def value(self, like: Tensor) -> Tensor:
        r"""The damping :math:`\delta`, a scalar on the device of ``like``."""
        if "damping" not in self.state:
            self.state["damping"] = torch.tensor(self.initial, dtype=torch.float64, device=like.device)
        return self.state["damping"].to(like.dtype)

    def due(self) -> bool:
        """Counts a step; whether the reduction should be measured at it."""
        self.state["steps"] += 1
        return self.state["steps"] % self.every == 0

    def judge(self, actual: Tensor, predicted: Tensor) -> None:
        """Adapt to the ratio of the two reductions (scalars). A ratio that is not a number counts as a failure."""
        ratio = (actual / predicted).double().nan_to_num(nan=-1.0)
        damping = self.state["damping"]
        damping = torch.where(ratio > 0.75, damping * self.factor, damping)
        damping = torch.where(ratio < 0.25, damping / self.factor, damping)
        self.state["damping"] = damping.clamp(self.minimum, self.maximum)
        self.state["ratio"] = ratio
