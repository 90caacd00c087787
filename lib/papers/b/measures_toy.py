"""Paper B's toy model measured along gradient descent: tables for the figure and the checks B-TOY."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from curvspace.datasets.generated import gaussian_mixture
from papers.b import toy

RANK_TOLERANCE = 1e-10
"""An eigenvalue counts towards the rank if it is above this share of the largest."""


def toy_model(
    context: Any,
    *,
    cases: Sequence[Mapping[str, Any]],
    times: Sequence[float],
    lr: float = 0.5,
    dimension: int = 1000,
    per_class: int = 10,
    listed: int = 12,
    seed: int = 0,
) -> pd.DataFrame:
    """One table for all cases, one observation a row.

    A case is ``{classes, sigma, orthonormal, bias, start}``: ``start`` is the standard deviation of the initial
    margins (0: the symmetric start, for which the closed form holds with any number of classes). Columns: the
    case, ``step``, ``time`` (lr times step), ``quantity``, ``index``, ``value``, and ``expected`` where the closed
    form says what to expect. Quantities:

    - ``loss``, ``gradient_norm``;
    - ``eigenvalue`` 1..``listed``, largest first;
    - ``rank``: eigenvalues above 1e-10 of the largest;
    - ``f_top``: share of the squared gradient in the top k eigenvectors (eq. 2);
    - ``f_smallest``: share along the smallest of these k eigenvectors;
    - ``bulk_edge``: the largest eigenvalue outside the k(k-1) directions that sigma = 0 has;
    - ``dominance``: sum of the k top eigenvalues over that of all k(k-1) first ones.
    """
    steps = sorted({round(t / lr) for t in times})
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(context.progress(list(cases), "toy models")):
        for step, quantities in _along(case, steps, lr, dimension, per_class, listed, seed):
            rows += [{"case": number, **_described(case), "step": step, "time": lr * step, **q} for q in quantities]
    return pd.DataFrame(rows)


def _described(case: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"classes": 2, "sigma": 0.0, "orthonormal": True, "bias": False, "start": 0.0}
    if unknown := sorted(set(case) - set(defaults)):
        raise ValueError(f"unknown key {unknown[0]!r} in a case of the toy model; allowed: {', '.join(defaults)}")
    return {**defaults, **case}


def _along(
    case: Mapping[str, Any], steps: Sequence[int], lr: float, dimension: int, per_class: int, listed: int, seed: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Gradient descent on one case; the quantities at each of the steps."""
    case = _described(case)
    k, per_class = case["classes"], per_class if case["sigma"] else 1  # without noise all examples of a class are equal
    data = gaussian_mixture(k, dimension, case["sigma"], per_class, case["orthonormal"], seed)
    inputs, labels = data.train_inputs, data.train_targets
    if case["bias"]:
        inputs = toy.with_bias(inputs)
    theta = case["start"] * np.random.default_rng([seed, 1]).standard_normal((k, inputs.shape[1]))
    solved = case["sigma"] == 0 and case["orthonormal"] and not case["bias"] and (k == 2 or case["start"] == 0)
    margins = _margins(theta, inputs, labels)
    for step, theta_t in toy.descend(theta, inputs, labels, lr, steps):
        expected = _expected(lr * step, k, margins) if solved else {}
        yield step, _quantities(theta_t, inputs, labels, k, listed, expected)


def _margins(theta: toy.Array, inputs: toy.Array, labels: Any) -> toy.Array:
    """Logit of the right class less the mean of the others', for the first example of each class."""
    k = len(theta)
    first = [int(np.argmax(labels == c)) for c in range(k)]
    logits = inputs[first] @ theta.T
    right = np.diag(logits)
    return right - (logits.sum(axis=1) - right) / (k - 1)


def _expected(time: float, k: int, margins: toy.Array) -> dict[tuple[str, int], float]:
    """The closed form's values by (quantity, index); for k = 2 each class has its own margin."""
    solutions = [toy.closed_form(np.array(time), k, float(m)) for m in margins]
    tops = sorted((float(s.top) for s in solutions), reverse=True)
    values = {("eigenvalue", i + 1): tops[i] for i in range(k)}
    values |= {("eigenvalue", i): float(solutions[0].rest) for i in range(k + 1, k * (k - 1) + 1)}
    values["gradient_norm", 0] = float(np.sqrt(np.mean([s.gradient_norm**2 for s in solutions])))
    values["loss", 0] = float(np.mean([np.log1p((k - 1) * np.exp(-s.margin)) for s in solutions]))
    values["rank", 0] = k * (k - 1)
    if k == 2 or time > 0:  # at the start all k(k - 1) eigenvalues are equal, so there are no k top ones
        values["f_top", 0] = 1.0
    return values


def _quantities(
    theta: toy.Array, inputs: toy.Array, labels: Any, k: int, listed: int, expected: Mapping[tuple[str, int], float]
) -> list[dict[str, Any]]:
    loss, gradient = toy.loss_and_gradient(theta, inputs, labels)
    values, vectors = toy.spectrum(theta, inputs)
    g = gradient.reshape(-1)
    shares = (vectors[:, :k].T @ g) ** 2 / (g @ g)
    nontrivial = k * (k - 1)
    found = {("eigenvalue", i + 1): values[i] for i in range(min(listed, len(values)))}
    found |= {
        ("loss", 0): loss,
        ("gradient_norm", 0): np.linalg.norm(g),
        ("rank", 0): np.sum(values > RANK_TOLERANCE * values[0]),
        ("f_top", 0): shares.sum(),
        ("f_smallest", 0): shares[-1],
        ("dominance", 0): values[:k].sum() / values[:nontrivial].sum(),
    }
    if len(values) > nontrivial:
        found["bulk_edge", 0] = values[nontrivial]
    return [
        {"quantity": name, "index": index, "value": float(value), "expected": expected.get((name, index), np.nan)}
        for (name, index), value in found.items()
    ]
