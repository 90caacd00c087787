"""Data sets made from a seed: paper B's Gaussian mixture and its noisy sine."""

from __future__ import annotations

import numpy as np

from curvspace.datasets.store import Arrays


def gaussian_mixture(
    classes: int = 2,
    dim: int = 1000,
    sigma: float = 0.02,
    per_class: int = 50,
    orthonormal: bool = False,
    seed: int = 0,
) -> Arrays:
    r"""Paper B, section 3: :math:`x \sim \mathcal N(\mu_y, \sigma^2 I)`, classes y equally frequent.

    The means are random unit vectors of dimension ``dim``; with ``orthonormal`` they are made exactly orthogonal, as
    the closed form of the toy model supposes (random ones are nearly so in high dimension). The test set is a second
    draw around the same means. Inputs are float64 (N, dim); the paper gives neither N nor the dimension.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    if classes < 2 or dim < 1 or per_class < 1 or sigma < 0 or (orthonormal and classes > dim):
        raise ValueError(
            "gaussian-mixture needs classes ≥ 2, dim ≥ 1 (≥ classes if orthonormal), per_class ≥ 1 and sigma ≥ 0; got "
            f"classes={classes}, dim={dim}, per_class={per_class}, sigma={sigma}, orthonormal={orthonormal}"
        )
    random = np.random.default_rng(seed)
    means = random.standard_normal((classes, dim))
    if orthonormal:
        means = np.ascontiguousarray(np.linalg.qr(means.T)[0].T)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    targets = np.repeat(np.arange(classes), per_class)

    def draw() -> np.ndarray:
        return means[targets] + sigma * random.standard_normal((len(targets), dim))

    return Arrays(draw(), targets, draw(), targets.copy(), num_classes=classes)


def sine(examples: int = 10000, test_examples: int = 1000, noise: float = 0.1, seed: int = 0) -> Arrays:
    r"""Paper B, table 1, "Regression": :math:`y = \sin x + \varepsilon`, x uniform over one period.

    x in [−π, π) as float64 (N, 1), ε normal with standard deviation ``noise``; the test set has noise, too. The paper
    does not give the number of examples.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    if examples < 1 or test_examples < 1 or noise < 0:
        raise ValueError(
            f"sine needs examples ≥ 1, test_examples ≥ 1 and noise ≥ 0; got {examples}, {test_examples}, {noise}"
        )
    random = np.random.default_rng(seed)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.uniform(-np.pi, np.pi, (count, 1))
        return x, np.sin(x) + noise * random.standard_normal((count, 1))

    return Arrays(*draw(examples), *draw(test_examples), num_classes=1)
