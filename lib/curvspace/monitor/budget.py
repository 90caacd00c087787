"""How often to measure: seconds of measuring are paid for by seconds of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real


class Budget:
    r"""Time earned by training at the rate ``share`` and spent by measuring.

    .. math:: \text{credit} \leftarrow \min(\text{credit} + s\,\Delta t_{train},\ c), \qquad
              \text{due} \iff \text{credit} \ge c

    with c the forecast of one measurement, the largest of its last three costs. What was spent beyond the credit is
    paid back first. Credit is never hoarded above one measurement, so that a pause is not followed by a burst.

    Parameters
    ----------
    share
        Seconds of measuring per second of training, for example 0.05. None: no limit.
    clock
        Gives seconds.

    Attributes
    ----------
    training_s, spent_s : seconds of training and of measuring since the start
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter):
        if share is not None and not (isinstance(share, Real) and share > 0):
            raise ValueError(f"share must be positive, or None for no limit, got {share!r}")
        self.share = share
        self.training_s = self.spent_s = 0.0
        self._clock = clock
        self._last: float | None = None
        self._credit = 0.0
        self._costs: list[float] = []
        self._expected = 0.0

    @property
    def forecast_s(self) -> float:
        """Seconds that the next measurement is expected to take."""
        return max(self._costs[-3:], default=self._expected)

    @property
    def overhead(self) -> float:
        """Seconds of measuring per second of training so far."""
        return self.spent_s / self.training_s if self.training_s > 0 else 0.0

    def expect(self, seconds: float) -> None:
        """A first forecast, until there are costs."""
        self._expected = seconds

    def tick(self) -> bool:
        """The time since the last call was training; whether a measurement is due now."""
        now = self._clock()
        trained = 0.0 if self._last is None else now - self._last
        self._last = now
        self.training_s += trained
        if self.share is None:
            return True
        self._credit = min(self._credit + self.share * trained, self.forecast_s)
        return self._credit >= self.forecast_s

    @contextmanager
    def spending(self, typical: bool = False) -> Iterator[None]:
        """The time inside is measuring; ``typical``: its length forecasts the next."""
        start = self._clock()
        if self._last is not None:
            self.training_s += start - self._last
            self._credit += (self.share or 0.0) * (start - self._last)
        try:
            yield
        finally:
            self._last = self._clock()
            cost = self._last - start
            self.spent_s += cost
            self._credit -= cost
            if typical:
                self._costs.append(cost)
