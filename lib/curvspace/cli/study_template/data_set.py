"""Spirals in the plane, one a class. Called with the options of the data set's entry in the settings."""

from __future__ import annotations

import numpy as np

from curvspace.datasets.store import Arrays


def load(noise: float = 0.05, classes: int = 3, seed: int = 0) -> Arrays:
    """2,000 training and 500 test points (x, y)."""
    random = np.random.default_rng(seed)

    def points(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = random.integers(classes, size=count)
        radius = random.uniform(0.1, 1.0, count)
        angle = 2 * np.pi * label / classes + 4 * radius + random.normal(0, noise, count)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype("float32"), label

    return Arrays(*points(2000), *points(500), num_classes=classes)
