r"""Paper C's problems with known solutions, for many runs at once.

A problem is a sum of squares :math:`f(w) = |r(w)|^2` of M residuals in P parameters, in closed form and for a batch
of B independent runs: ``w`` is (B, P), ``residuals`` (B, M), ``jacobian`` (B, M, P). The gradient is
:math:`2 J^\top r`, the Gauss-Newton matrix :math:`2 J^\top J`. ``noise`` (B,) is what one evaluation draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Rosenbrock:
    r"""Paper C, eq. 20: :math:`(1-u)^2 + 100\,\epsilon\,(v-u^2)^2`, with :math:`\epsilon` drawn from U[low, high]
    at each evaluation; residuals :math:`(1-u,\ 10\sqrt\epsilon\,(v-u^2))`.

    Runs start at :math:`(-1.2, 1)` plus normal noise of s.d. ``spread`` in each coordinate.
    """

    low: float = 1.0
    high: float = 1.0
    spread: float = 0.1

    def starts(self, runs: int, rng: np.random.Generator) -> Array:
        return np.array([-1.2, 1.0]) + self.spread * rng.standard_normal((runs, 2))

    def draw(self, runs: int, rng: np.random.Generator) -> Array:
        return rng.uniform(self.low, self.high, runs) if self.high > self.low else np.full(runs, self.low)

    def take(self, index: Array) -> Rosenbrock:
        """The problem of the runs ``index``: the same for all."""
        return self

    def objective(self, w: Array) -> Array:
        """The noiseless value (ε = 1), by which convergence is judged."""
        return (self.residuals(w, np.ones(len(w))) ** 2).sum(1)

    def residuals(self, w: Array, noise: Array) -> Array:
        u, v = w[:, 0], w[:, 1]
        return np.stack([1 - u, 10 * np.sqrt(noise) * (v - u**2)], axis=1)

    def jacobian(self, w: Array, noise: Array) -> Array:
        scale = 10 * np.sqrt(noise)
        jacobian = np.zeros((len(w), 2, 2))
        jacobian[:, 0, 0] = -1
        jacobian[:, 1, 0] = -2 * scale * w[:, 0]
        jacobian[:, 1, 1] = scale
        return jacobian

    def gradient(self, w: Array, noise: Array) -> Array:
        u, residual = w[:, 0], w[:, 1] - w[:, 0] ** 2
        curved = 200 * noise * residual
        return np.stack([2 * (u - 1) - 2 * u * curved, curved], axis=1)


@dataclass(frozen=True)
class TwoLayerLinear:
    r"""Rahimi and Recht's problem: fit :math:`W_1 W_2 x` to :math:`y = A x` with an ill-conditioned A.

    .. math:: f = \frac1N\sum_n |(W_1 W_2 - A) x_n|^2 = |(W_1 W_2 - A) S^{1/2}|_F^2, \quad S = \frac1N\sum x_n x_n^\top:

    the sample enters through S alone, so the O·D entries of that matrix are the residuals. Each run has its own A,
    sample and start. ``targets`` (B, O, D) are :math:`A S^{1/2}`, ``roots`` (B, D, D) :math:`S^{1/2}`. w holds
    :math:`W_1` (O, H) row by row, then :math:`W_2` (H, D).
    """

    targets: Array
    roots: Array
    hidden: int = 6
    scale: float = 1.0

    @classmethod
    def sample(
        cls,
        runs: int,
        rng: np.random.Generator,
        inputs: int = 6,
        hidden: int = 6,
        outputs: int = 10,
        examples: int = 1000,
        condition: float = 1e5,
        scale: float = 1.0,
    ) -> TwoLayerLinear:
        """A with singular values evenly spaced from 1 to 1/condition and random singular vectors; x normal.

        ``scale`` is the s.d. of the entries of both layers at the start, times 1/√(fan in).
        """
        left = np.linalg.qr(rng.standard_normal((runs, outputs, inputs)))[0]
        right = np.linalg.qr(rng.standard_normal((runs, inputs, inputs)))[0]
        matrix = left * np.linspace(1.0, 1 / condition, inputs) @ right
        x = rng.standard_normal((runs, examples, inputs))
        values, vectors = np.linalg.eigh(x.transpose(0, 2, 1) @ x / examples)
        roots = vectors * np.sqrt(values)[:, None, :] @ vectors.transpose(0, 2, 1)
        return cls(matrix @ roots, roots, hidden, scale)

    def starts(self, runs: int, rng: np.random.Generator) -> Array:
        outputs, inputs = self.targets.shape[1:]
        first = rng.standard_normal((runs, outputs * self.hidden)) / np.sqrt(self.hidden)
        second = rng.standard_normal((runs, self.hidden * inputs)) / np.sqrt(inputs)
        return self.scale * np.concatenate([first, second], axis=1)

    def draw(self, runs: int, rng: np.random.Generator) -> Array:
        return np.ones(runs)

    def take(self, index: Array) -> TwoLayerLinear:
        """The problem of the runs ``index``."""
        return TwoLayerLinear(self.targets[index], self.roots[index], self.hidden, self.scale)

    def _layers(self, w: Array) -> tuple[Array, Array]:
        outputs, inputs = self.targets.shape[1:]
        cut = outputs * self.hidden
        return w[:, :cut].reshape(-1, outputs, self.hidden), w[:, cut:].reshape(-1, self.hidden, inputs)

    def _errors(self, w: Array) -> Array:
        first, second = self._layers(w)
        return first @ (second @ self.roots) - self.targets

    def objective(self, w: Array) -> Array:
        return (self._errors(w) ** 2).sum((1, 2))

    def residuals(self, w: Array, noise: Array) -> Array:
        return self._errors(w).reshape(len(w), -1)

    def jacobian(self, w: Array, noise: Array) -> Array:
        first, second = self._layers(w)
        runs, (outputs, inputs) = len(w), self.targets.shape[1:]
        eye = np.eye(outputs)
        by_first = np.einsum("oa,bhd->bodah", eye, second @ self.roots)
        by_second = np.einsum("boh,bed->bodhe", first, self.roots)
        size = outputs * inputs
        return np.concatenate([by_first.reshape(runs, size, -1), by_second.reshape(runs, size, -1)], axis=2)

    def gradient(self, w: Array, noise: Array) -> Array:
        first, second = self._layers(w)
        outer = 2 * self._errors(w) @ self.roots.transpose(0, 2, 1)
        by_first = outer @ second.transpose(0, 2, 1)
        by_second = first.transpose(0, 2, 1) @ outer
        return np.concatenate([by_first.reshape(len(w), -1), by_second.reshape(len(w), -1)], axis=1)


Problem = Rosenbrock | TwoLayerLinear

ROSENBROCK = {
    "deterministic": Rosenbrock(1.0, 1.0),
    "U[0, 1]": Rosenbrock(0.0, 1.0),
    "U[0, 3]": Rosenbrock(0.0, 3.0),
}
PROBLEMS = (*ROSENBROCK, "Rahimi-Recht")
"""The columns of paper C's table 1."""


def build_problem(name: str, runs: int, rng: np.random.Generator) -> Problem:
    """One of :data:`PROBLEMS` for so many runs."""
    if name in ROSENBROCK:
        return ROSENBROCK[name]
    if name == "Rahimi-Recht":
        return TwoLayerLinear.sample(runs, rng)
    raise ValueError(f"unknown problem {name!r}; use one of {', '.join(PROBLEMS)}")
