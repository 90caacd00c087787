r"""The loss along lines and planes through parameter space: scans, quadratic fits, line searches.

With u a unit direction, everything here is about :math:`f(t) = L(\theta + t u)`. Paper D's eq. 1 scales its step by
the slope: :math:`L(\theta - \alpha (g^\top u) u) = f(-\alpha\, g^\top u)`, so a range of :math:`|\alpha|` is a range
of :math:`|t|`, and on a quadratic the best :math:`\alpha` is one over the curvature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import vmap

from curvspace.curvature.linearisation import Point
from curvspace.curvature.memory import is_out_of_memory
from curvspace.differentiation import without_graph
from curvspace.functional import flatten, unflatten
from curvspace.inner import inner, norm
from curvspace.inputs import map_tensors
from curvspace.losses import Loss
from curvspace.objective import Objective
from curvspace.threads import one_at_a_time

Floats = NDArray[np.float64]
Method = Literal["loop", "vmap"]


class LossScanner:
    """The loss of an objective at many points of parameter space near its model's present parameters.

    ``loop`` evaluates point after point on data that stay on the device; ``vmap`` evaluates ``chunk`` points in one
    pass. On a CPU the loop was the faster one for every convolutional network tried (see D-C3), on a GPU small
    networks gain from ``vmap``. Losses are averaged in float64 whatever the network's own precision.

    Attributes
    ----------
    evaluations, seconds : points evaluated so far, and the time that took
    resolution : smallest difference of two losses that is more than rounding
    """

    @one_at_a_time
    def __init__(self, objective: Objective, method: Method = "loop", chunk: int = 8):
        if method not in ("loop", "vmap"):
            raise ValueError(f'method must be "loop" or "vmap", got {method!r}')
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.objective = objective
        self.method = method
        self.chunk = chunk
        self._point = Point.here(objective.function, _InDouble(objective.loss_function))
        cast = objective.function.cast  # once, so that the data stay on the device
        given = objective.batches_for_all_parameters
        self._batches = [replace(b, inputs=cast(b.inputs), targets=cast(b.targets)) for b in given]
        self.origin = flatten(p.detach() for p in self._point.parameters)
        self.evaluations = 0
        self.seconds = 0.0
        try:
            self.along(torch.zeros_like(self.origin), [0.0])
            exact = True
        except ValueError:  # a callable with tensors of its own in the network's type
            self._point, exact = replace(self._point, loss=objective.loss_function), False
        self.origin_loss = float(self.along(torch.zeros_like(self.origin), [0.0])[0])
        # Measured against float64, a float32 network's mean loss errs by about 0.1 eps; twenty times that is safe.
        # Where the loss itself is in float32, its mean adds some eps.
        self.resolution = (2 if exact else 20) * torch.finfo(self.origin.dtype).eps * max(abs(self.origin_loss), 1e-3)

    @property
    def evaluations_per_second(self) -> float:
        return self.evaluations / self.seconds if self.seconds else float("nan")

    def along(self, direction: Tensor, t: Sequence[float] | Floats) -> Floats:
        r""":math:`L(\theta + t_i d)` for each i: direction (P,), t (m,), result (m,)."""
        return self._along(self.origin, direction, t)

    @one_at_a_time
    @torch.inference_mode(False)
    @torch.no_grad()
    def _along(self, origin: Tensor, direction: Tensor, t: Sequence[float] | Floats) -> Floats:
        start = time.perf_counter()
        direction, points = self._direction(direction), _numbers(t)
        if self.method == "vmap":
            losses = torch.cat([self._together(origin, direction, part) for part in _chunks(points, self.chunk)])
        else:
            losses = torch.stack([self._one(origin + value * direction) for value in points])
        result = losses.cpu().numpy()
        self.evaluations += len(points)
        self.seconds += time.perf_counter() - start
        return result

    def plane(self, u: Tensor, v: Tensor, s: Sequence[float] | Floats, t: Sequence[float] | Floats) -> Floats:
        r""":math:`L(\theta + s_i u + t_j v)`: directions (P,), s (m,), t (n,), result (m, n)."""
        u = self._direction(u)
        return np.stack([self._along(self.origin + value * u, v, t) for value in _numbers(s)])

    def _direction(self, given: Tensor) -> Tensor:
        """In the type and on the device of the parameters."""
        if given.shape != self.origin.shape:
            raise ValueError(f"a direction must have shape {tuple(self.origin.shape)}, got {tuple(given.shape)}")
        if given.is_complex():
            raise ValueError(f"a direction must be real, got {given.dtype}")
        return given.detach().to(self.origin)

    def _one(self, theta: Tensor) -> Tensor:
        point = replace(self._point, parameters=unflatten(theta, self._point.parameters))
        total = torch.zeros((), dtype=torch.float64, device=theta.device)
        for b in self._batches:
            total = total + b.weight * without_graph(partial(point.value, b)).double()
        return total

    def _together(self, origin: Tensor, direction: Tensor, t: Sequence[float]) -> Tensor:
        try:
            return self._many(origin, direction, t)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            name = type(self.objective.model).__name__
            raise RuntimeError(f'torch.func.vmap cannot evaluate {name}: take method="loop" ({error})') from error

    def _many(self, origin: Tensor, direction: Tensor, t: Sequence[float]) -> Tensor:
        steps = torch.tensor(t, dtype=origin.dtype, device=origin.device)
        return vmap(self._one)(origin + steps[:, None] * direction)


class _InDouble(Loss):
    """A loss of the outputs in float64."""

    def __init__(self, loss: Loss):
        self.inner, self.name = loss, loss.name

    def outputs(self, raw: Any) -> Any:
        return self.inner.outputs(raw)

    def at_rest(self, apart_from: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
        return self.inner.at_rest(apart_from)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        z = _double(outputs) if isinstance(outputs, Tensor) else outputs
        return self.inner(z, map_tensors(_double, targets))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _numbers(t: Sequence[float] | Floats) -> list[float]:
    values = np.atleast_1d(t)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"displacements must be one or more numbers (m,), got shape {values.shape}")
    return [float(value) for value in values]


def plane_through(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal directions u, v (P,) of the plane through three points (3, P), and the points in it, (3, 2).

    The first point is the origin, the second lies on u.
    """
    if points.ndim != 2 or len(points) != 3:
        raise ValueError(f"a plane goes through three points (3, P), got shape {tuple(points.shape)}")
    if not points.isfinite().all():
        raise ValueError("the three points have entries that are not finite")
    first, second = points[1:] - points[0]
    across = norm(first)
    u = first / across
    along = inner(u, second)
    rest = second - along * u
    rest = rest - inner(u, rest) * u
    up = norm(rest)
    if not float(torch.minimum(across, up)) > 1e-6 * float(torch.maximum(across, up)):
        raise ValueError("the three points lie on one line: there is no plane through them")
    zero = torch.zeros_like(up)
    return u, rest / up, torch.stack([zero, zero, across, zero, along, up]).reshape(3, 2)


def _chunks(values: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


@dataclass(frozen=True)
class QuadraticFit:
    r"""Least squares of :math:`c + s t + \tfrac12 \kappa t^2` to a scan over :math:`|t| \le` ``radius``.

    ``resolved``: the quadratic part at the ends is at least ten times what rounding could feign.
    """

    curvature: float
    slope: float
    radius: float
    resolved: bool


def fit_quadratic(scanner: LossScanner, direction: Tensor, radius: float, points: int = 11) -> QuadraticFit:
    """A parabola through the loss at equally spaced points with |t| ≤ radius (paper D, fig. 4)."""
    if points < 3:
        raise ValueError(f"a parabola needs at least 3 points, got {points}")
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    if radius == 0 or not np.isfinite(scanner.origin_loss):
        return QuadraticFit(np.nan, np.nan, 0.0, False)
    x = np.linspace(-1.0, 1.0, points)  # the fit in units of the radius is well conditioned at any scale
    change = scanner.along(direction, radius * x) - scanner.origin_loss
    quadratic, linear, _ = np.polyfit(x, change, 2)
    resolved = abs(quadratic) > 10 * scanner.resolution
    return QuadraticFit(2 * quadratic / radius**2, linear / radius, radius, bool(resolved))


@dataclass(frozen=True)
class LineSearch:
    """The global minimiser over |t| ≤ radius, as far as the grid could see.

    t: the displacement, 0 where the direction improves nowhere. improvement: L(0) − L(t) ≥ 0. improves: whether
    that is more than rounding. at_edge: the best grid point was an end of the range, so that a longer range might
    give more. evaluations: losses that it took.
    """

    t: float
    improvement: float
    improves: bool
    at_edge: bool
    evaluations: int


def search_grid(radius: float, points: int, smallest: float) -> Floats:
    """``points`` displacements of either sign, spaced evenly in their logarithm from ``smallest`` to ``radius``."""
    side = np.geomspace(smallest, radius, points)
    return np.concatenate([-side[::-1], [0.0], side])


def line_search(
    scanner: LossScanner, direction: Tensor, radius: float, points: int = 16, smallest: float = 1e-4, tol: float = 1e-3
) -> LineSearch:
    """The lowest loss along ±direction within ``radius``: the best point of a grid, then Brent's method from there.

    Parameters
    ----------
    direction
        (P,), a unit vector.
    points, smallest
        Of :func:`search_grid`: the optimum may be a small step or a large one.
    tol
        Relative accuracy of t.
    """
    if points < 2:
        raise ValueError(f"a line search needs at least 2 points of either sign, got {points}")
    if not 0 < smallest < radius:
        raise ValueError(f"smallest must lie between 0 and the radius {radius}, got {smallest}")
    if not np.isfinite(scanner.origin_loss):
        raise ValueError(f"a line search needs a finite loss to start from, got {scanner.origin_loss} at the origin")
    start = scanner.evaluations
    grid = search_grid(radius, points, smallest)
    losses = np.full_like(grid, np.nan)
    losses[grid != 0] = scanner.along(direction, grid[grid != 0])
    if np.isnan(losses[grid != 0]).all():
        raise ValueError("the loss is not a number wherever the line search looks: is the direction finite?")
    losses[points] = scanner.origin_loss
    best = int(np.nanargmin(losses))
    if scanner.origin_loss - losses[best] <= scanner.resolution:
        return LineSearch(0.0, 0.0, False, False, scanner.evaluations - start)
    at_edge = best in (0, len(grid) - 1)
    t, loss = grid[best], losses[best]
    if not at_edge:
        t, loss = _refine(lambda x: float(scanner.along(direction, [x])[0]), grid, losses, best, tol)
    return LineSearch(float(t), float(scanner.origin_loss - loss), True, at_edge, scanner.evaluations - start)


def _refine(f: Callable[[float], float], grid: Floats, losses: Floats, best: int, tol: float) -> tuple[float, float]:
    """Brent's method within the grid points beside the best one; the better of its answer and the grid's."""
    low, middle, high = grid[best - 1 : best + 2]
    options: dict[str, Any] = {"bounds": (low, high), "method": "bounded", "options": {"xatol": tol * abs(middle)}}
    beside = losses[best - 1], losses[best + 1]
    if np.isfinite(beside).all() and losses[best] < min(beside):
        options = {"bracket": (low, middle, high), "method": "brent", "options": {"xtol": tol}}
    found = minimize_scalar(f, **options)
    if found.fun < losses[best]:
        return float(found.x), float(found.fun)
    return float(middle), float(losses[best])
