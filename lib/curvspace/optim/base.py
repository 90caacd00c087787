"""What all optimisers of this package share: the model, the loss, honest costs, one flat extra state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvspace.functional import Inputs, trainable_parameters
from curvspace.losses import Loss, get_loss


@dataclass
class Costs:
    """What an optimiser has spent so far, in passes over one minibatch (a pass over half of it counts 0.5).

    ``products`` counts curvature products; the forward-mode and reverse-mode passes that they consist of are
    counted in ``jvp`` and ``backward`` too. ``seconds`` is wall-clock inside ``step``.
    """

    forward: float = 0.0
    backward: float = 0.0
    jvp: float = 0.0
    products: float = 0.0
    seconds: float = 0.0

    @property
    def gradient_evaluations(self) -> float:
        """Gradient-equivalents: a gradient is one forward and one backward pass, these two and a
        forward-mode pass weighing 1 : 2 : 2 (arithmetic of a linear layer)."""
        return (self.forward + 2 * self.backward + 2 * self.jvp) / 3

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "gradient_evaluations": self.gradient_evaluations}


class ModelOptimizer(torch.optim.Optimizer):
    """An optimiser that evaluates the model itself: ``loss = opt.step(inputs, targets)``.

    Subclasses implement ``_step(inputs, targets) -> loss before the step`` and, if they keep state outside
    ``self.state``, ``_extra_state() -> dict`` and ``_load_extra_state(dict)``.
    """

    def __init__(
        self, model: nn.Module, defaults: dict[str, Any], loss: str | Loss | Callable[[Tensor, Tensor], Tensor]
    ):
        super().__init__(list(trainable_parameters(model).values()), defaults)
        self.model = model
        self.loss = get_loss(loss)
        self.costs = Costs()
        self.steps = 0
        """Steps taken; inside ``_step``, those before it."""
        self.grad_norm: Tensor | None = None
        """|g| of the last minibatch, a scalar on the device; None where the gradient is never formed alone."""

    def step(self, inputs: Inputs, targets: Tensor) -> Tensor:  # type: ignore[override]
        """One step on a minibatch; returns its mean loss before the step (a detached scalar)."""
        start = time.perf_counter()
        loss = self._step(inputs, targets)
        self.steps += 1
        self.costs.seconds += time.perf_counter() - start
        return loss.detach()

    def _step(self, inputs: Inputs, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(f"{type(self).__name__} takes one param group: its step couples all parameters")
        super().add_param_group(param_group)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the model has the parameters that are to be judged: for most optimisers the present ones."""
        yield

    def log(self) -> dict[str, float]:
        """Scalars worth a column of ``metrics.csv`` after each step (damping, ratio, ...)."""
        return {}

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps, "costs": asdict(self.costs), "extra": self._extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self.steps, self.costs = state_dict["steps"], Costs(**state_dict["costs"])
        self._load_extra_state(state_dict["extra"])


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ``ValueError`` that a bad hyper-parameter deserves."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def refuse_old(renamed: Mapping[str, str], **given: object) -> None:
    """Raise the ``ValueError`` that says what an old option, or an old value of one (``option=value``), is now."""
    for name, value in given.items():
        new = renamed.get(f"{name}={value}", renamed.get(name))
        if new is not None:
            raise ValueError(f"{name}={value!r} is now {new}")
