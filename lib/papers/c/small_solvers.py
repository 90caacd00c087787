"""Paper C's five solvers on the small problems: all runs of all settings in one batch (BFGS: scipy's, run by run).

An iteration is one update of the parameters (for Levenberg–Marquardt one proposal, taken or refused). It draws one
noise sample and sees it in all its evaluations, as it would one minibatch; scipy's BFGS draws at every evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from papers.c.small_problems import Array, Problem

Settings = Mapping[str, Any]


class Solver:
    """State arrays of leading dimension B, and one ``step`` for all runs. ``settings`` are (B,) arrays by name."""

    def __init__(self, w: Array, settings: Mapping[str, Array]):
        self.state: dict[str, Array] = {name: np.asarray(value, dtype=float) for name, value in settings.items()}

    def take(self, keep: Array) -> None:
        """Forget all runs but ``keep``."""
        self.state = {name: value[keep] for name, value in self.state.items()}

    def step(self, problem: Problem, w: Array, noise: Array) -> Array:
        """The next parameters (B, P)."""
        raise NotImplementedError


class MomentumSGD(Solver):
    """Paper C, eq. 2-3: z ← momentum z − lr g; w ← w + z."""

    def __init__(self, w: Array, settings: Mapping[str, Array]):
        super().__init__(w, settings)
        self.state["z"] = np.zeros_like(w)

    def step(self, problem: Problem, w: Array, noise: Array) -> Array:
        s = self.state
        s["z"] = s["momentum"][:, None] * s["z"] - s["lr"][:, None] * problem.gradient(w, noise)
        return w + s["z"]


class Adam(Solver):
    """Adam with bias correction; its second decay rate is a setting, its first 0.9 unless given."""

    def __init__(self, w: Array, settings: Mapping[str, Array]):
        super().__init__(w, settings)
        self.state |= {"m": np.zeros_like(w), "v": np.zeros_like(w), "t": np.zeros(len(w))}
        self.state.setdefault("beta1", np.full(len(w), 0.9))

    def step(self, problem: Problem, w: Array, noise: Array) -> Array:
        s = self.state
        g = problem.gradient(w, noise)
        b1, b2 = s["beta1"][:, None], s["beta2"][:, None]
        s["t"] = s["t"] + 1
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        t = s["t"][:, None]
        return w - s["lr"][:, None] * (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + 1e-8)


class LevenbergMarquardt(Solver):
    """(2JᵀJ + λI) d = −g; taken if f falls, λ / factor, else λ · factor."""

    def step(self, problem: Problem, w: Array, noise: Array) -> Array:
        s = self.state
        residuals, jacobian = problem.residuals(w, noise), problem.jacobian(w, noise)
        matrix = 2 * jacobian.transpose(0, 2, 1) @ jacobian
        matrix += s["damping"][:, None, None] * np.eye(w.shape[1])
        gradient = 2 * np.einsum("bmp,bm->bp", jacobian, residuals)
        proposal = w - np.linalg.solve(matrix, gradient[..., None])[..., 0]
        better = (problem.residuals(proposal, noise) ** 2).sum(1) < (residuals**2).sum(1)
        s["damping"] = np.clip(np.where(better, s["damping"] / s["factor"], s["damping"] * s["factor"]), 1e-12, 1e12)
        return np.where(better[:, None], proposal, w)


class CurveBall(Solver):
    """Paper C, eq. 15, 16, 18, 19 and the damping rule: what :class:`curvspace.optim.CurveBall` does."""

    def __init__(self, w: Array, settings: Mapping[str, Array]):
        super().__init__(w, settings)
        self.state |= {"z": np.zeros_like(w), "count": np.zeros(len(w))}

    def step(self, problem: Problem, w: Array, noise: Array) -> Array:
        s = self.state
        z, damping = s["z"], s["damping"]
        residuals, jacobian = problem.residuals(w, noise), problem.jacobian(w, noise)
        along_z = np.einsum("bmp,bp->bm", jacobian, z)
        delta = 2 * np.einsum("bmp,bm->bp", jacobian, along_z + residuals) + damping[:, None] * z
        along_delta = np.einsum("bmp,bp->bm", jacobian, delta)
        a11, a12, a22 = (
            2 * (p * q).sum(1) + damping * (u * v).sum(1)
            for p, q, u, v in (
                (along_delta, along_delta, delta, delta),
                (along_delta, along_z, delta, z),
                (along_z, along_z, z, z),
            )
        )
        b1, b2 = (2 * (residuals * p).sum(1) for p in (along_delta, along_z))
        x1, x2 = _minimise(a11, a12, a22, b1, b2)
        s["z"] = x2[:, None] * z + x1[:, None] * delta
        proposal = w + s["z"]
        change = (problem.residuals(proposal, noise) ** 2).sum(1) - (residuals**2).sum(1)
        predicted = b1 * x1 + b2 * x2 + 0.5 * (a11 * x1**2 + 2 * a12 * x1 * x2 + a22 * x2**2)
        ratio = np.divide(change, predicted, out=np.full_like(change, np.nan), where=predicted != 0)
        move = np.where(ratio > 1.5, 0.999**5, np.where(ratio < 0.5, 0.999**-5, 1.0))
        s["damping"] = np.where(s["count"] % 5 == 0, damping * move, damping)
        s["count"] = s["count"] + 1
        return proposal


def _minimise(a11: Array, a12: Array, a22: Array, b1: Array, b2: Array) -> tuple[Array, Array]:
    """The minimum of bᵀx + xᵀAx/2; along the first direction alone where the second is zero or parallel."""
    determinant = a11 * a22 - a12**2
    regular = determinant > 1e-14 * a11 * a22
    safe = np.where(regular, determinant, 1.0)
    line = -np.divide(b1, a11, out=np.zeros_like(b1), where=a11 > 0)
    return (
        np.where(regular, -(a22 * b1 - a12 * b2) / safe, line),
        np.where(regular, -(a11 * b2 - a12 * b1) / safe, 0.0),
    )


SOLVERS: dict[str, type[Solver]] = {
    "sgd": MomentumSGD,
    "adam": Adam,
    "levenberg-marquardt": LevenbergMarquardt,
    "curveball": CurveBall,
    "curveball-searched": CurveBall,
}
"""By the name that configs and tables use; the last is ours: its first λ is searched like the others' settings."""


def solve(
    solver: str,
    problem: Problem,
    start: Array,
    settings: Mapping[str, Array],
    rng: np.random.Generator,
    tolerance: float,
    limit: int,
    trace: list[list[Array]] | None = None,
) -> Array:
    """Iterations (B,) until the noiseless objective is below ``tolerance``; NaN for runs not there after ``limit``.

    ``trace`` has a list for each of the first runs, which collects its parameters (P,) from the start to where it ends.
    """
    w, count = start.copy(), np.full(len(start), np.nan)
    alive = np.arange(len(start))
    method = SOLVERS[solver](w, settings)
    with np.errstate(all="ignore"):  # diverging settings of the grid overflow; they end as NaN
        for iteration in range(limit + 1):
            value = problem.objective(w)
            done = value < tolerance
            count[alive[done & np.isnan(count[alive])]] = iteration
            if trace is not None:
                for place in np.flatnonzero(alive < len(trace)):
                    trace[alive[place]].append(w[place].copy())
            keep = ~done & np.isfinite(value) & (value < 1e12)
            if not keep.all():
                alive, w, problem = alive[keep], w[keep], problem.take(np.flatnonzero(keep))
                method.take(keep)
            if not len(alive):
                break
            w = method.step(problem, w, problem.draw(len(w), rng))
    return count


def bfgs(
    problem: Problem,
    start: Array,
    rng: np.random.Generator,
    tolerance: float,
    limit: int,
    trace: list[Array] | None = None,
) -> float:
    """Iterations of scipy's BFGS (cubic line search) for one run, ``start`` (1, P); NaN if more than ``limit``.

    Where noise stops the line search, BFGS is started again from the same point with a fresh matrix; a restart that
    makes no progress counts as an iteration. ``trace`` collects the parameters (1, P) at each iteration, from the start
    on.
    """
    point, count = start[0].copy(), 0
    path: list[Array] = [] if trace is None else trace

    def evaluate(w: Array) -> tuple[float, Array]:
        noise = problem.draw(1, rng)
        value = float((problem.residuals(w[None], noise) ** 2).sum())
        return value, problem.gradient(w[None], noise)[0]

    def reached(w: Array) -> bool:
        return bool(problem.objective(w[None])[0] < tolerance)

    def record(intermediate_result: OptimizeResult) -> None:
        nonlocal point, count
        point, count = intermediate_result.x.copy(), count + 1
        path.append(point[None])
        if reached(point) or count >= limit:
            raise StopIteration

    path.append(point[None])
    with np.errstate(all="ignore"):
        while not reached(point) and count < limit:
            before = count
            minimize(evaluate, point, jac=True, method="BFGS", callback=record, options={"gtol": 0, "maxiter": limit})
            if before == count:
                count += 1
                path.append(point[None])
    return float(count) if reached(point) else float("nan")
