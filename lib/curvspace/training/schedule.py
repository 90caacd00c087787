r"""Learning-rate schedules: the factor of the run's rate as a pure function of the step.

With T steps in all and the rate :math:`\eta` of the run, step :math:`t = 0, \dots, T-1` is taken at
:math:`\eta f(t)`. A resumed run needs nothing but its step to go on at the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KINDS = ("constant", "linear", "cosine", "one-cycle", "per-epoch")


@dataclass(frozen=True)
class Schedule:
    r"""``Schedule("cosine", warmup=0.05).factor(step, total, per_epoch)``.

    Warm-up: over the first :math:`w` = round(``warmup`` · T) steps the factor is :math:`(t+1)/w`; with
    :math:`u = (t-w)/(T-w)` the rest is

    - ``constant``: 1
    - ``linear``: :math:`1-u`
    - ``cosine``: :math:`\tfrac12(1+\cos\pi u)`
    - ``per-epoch``: ``decay`` to the power of the epochs since the start of the run, fractions included

    ``one-cycle`` has its own rise: along a cosine from :math:`1/25` to 1, which it reaches at step
    ``warmup`` · T − 1 (default 0.3), then along a cosine to :math:`10^{-4}/25` at the last step (Smith and Topin
    2017, in the form of ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults; momentum stays).

    Raises
    ------
    ValueError
        For an unknown kind or a value out of range; the message names it.
    """

    kind: str = "constant"
    warmup: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"schedule.{name} must be a number, or null, got {value!r}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise ValueError(f"schedule.warmup must be a share of the steps in [0, 1), got {self.warmup!r}")
        if self.kind == "one-cycle" and self.warmup == 0:
            raise ValueError("schedule.warmup must be positive for one-cycle; use cosine without a warm-up")
        if (self.kind == "per-epoch") != (self.decay is not None):
            raise ValueError(
                f"schedule.decay belongs to kind per-epoch and it alone, got {self.decay!r} for {self.kind}"
            )
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"schedule.decay must be in (0, 1], got {self.decay!r}")

    @classmethod
    def of(cls, value: Schedule | Mapping[str, Any] | None) -> Schedule:
        """From a config's block; None is the constant rate."""
        if isinstance(value, Schedule):
            return value
        allowed = [f.name for f in fields(cls)]
        if unknown := sorted(set(value or {}) - set(allowed)):
            raise ValueError(f"unknown key {unknown[0]!r} in task.schedule; allowed: {', '.join(allowed)}")
        return cls(**(value or {}))

    def factor(self, step: int, total: int, per_epoch: int) -> float:
        """f at a step (from 0) of a run of ``total`` steps, ``per_epoch`` of them an epoch."""
        if self.kind == "one-cycle":
            return self._one_cycle(step, total)
        warm = round((self.warmup or 0.0) * total)
        if step < warm:
            return (step + 1) / warm
        u = (step - warm) / (total - warm)
        if self.kind == "linear":
            return 1 - u
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * u)) / 2
        return 1.0 if self.decay is None else self.decay ** (step / per_epoch)

    def _one_cycle(self, step: int, total: int) -> float:
        peak = max((0.3 if self.warmup is None else self.warmup) * total - 1, 0.0)
        low, high, share = (1 / 25, 1.0, step / peak) if step < peak else (1.0, 1e-4 / 25, 0.0)
        if step >= peak and total - 1 > peak:
            share = (step - peak) / (total - 1 - peak)
        return high + (low - high) * (1 + math.cos(math.pi * share)) / 2
