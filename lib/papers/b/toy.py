r"""Paper B's solvable model: softmax regression on k tight clusters, beside its exact solution.

Parameters :math:`\theta \in \mathbb{R}^{k\times d}`, examples :math:`x_a` with labels :math:`y_a`, class
probabilities :math:`p_a = \mathrm{softmax}(\theta x_a)`:

.. math::

    L = -\frac1n\sum_a \log p_{a,y_a}, \qquad
    \nabla L = \frac1n\sum_a (p_a - e_{y_a})\otimes x_a, \qquad
    H = \frac1n\sum_a \left(\mathrm{diag}(p_a) - p_a p_a^\top\right)\otimes x_a x_a^\top .

All is float64 numpy: the model is small, and its spectrum is exact through a Gram matrix (:func:`spectrum`).
A bias is one more input that equals 1 (:func:`with_bias`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import wrightomega

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClosedForm:
    """The exact solution at given times; each field has the times' shape."""

    margin: Array
    """Logit of the right class less that of each other class."""
    gradient_norm: Array
    top: Array
    """The k-fold eigenvalue (k = 2: both non-zero eigenvalues); tends to 1/time."""
    rest: Array
    """The k(k-2)-fold eigenvalue of the other non-trivial directions; tends to 1/(k time)."""


def closed_form(time: Array, classes: int, margin: float = 0.0) -> ClosedForm:
    r"""Gradient flow on k orthonormal points, one for each class, whose margins m are equal at time 0.

    With time :math:`\tau = \eta t`, each class's margin obeys
    :math:`\dot m = 1/(e^m + k - 1)`, so that

    .. math:: e^{m} + (k-1)\,m = \tau + e^{m_0} + (k-1)\,m_0

    which the Wright omega function solves. With :math:`q = 1/(e^m + k - 1)` (a wrong class's probability) and
    :math:`p = e^m q`, the Hessian has the eigenvalue pq k times, q/k k(k-2) times, and 0 otherwise; the gradient
    is the sum of the k top eigenvectors. Late, :math:`e^m \to \tau` and :math:`pq \to 1/\tau`.

    For k = 2 the two margins need not be equal: they evolve apart, and this solution holds for each by itself
    (``top`` is then its eigenvalue, and the squared gradient norms are to be averaged).
    This is what paper B's eq. 15-18 approximate late in training; the prefactor 2 printed in its eq. 8 and 17
    does not follow from them: the gradient's coefficients are 1/(2 time).

    Raises
    ------
    ValueError
        If ``classes`` is below 2 or a time is negative.
    """
    time = np.asarray(time, dtype=np.float64)
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    if np.any(time < 0):
        raise ValueError(f"time must not be negative, got {time.min()}")
    k = classes
    # e^m = (k-1) w with w + log w = s/(k-1) - log(k-1), and omega(z) is the w with w + log w = z
    s = time + np.exp(margin) + (k - 1) * margin
    exp_m = (k - 1) * np.real(wrightomega(s / (k - 1) - np.log(k - 1)))
    q = 1.0 / (exp_m + k - 1)
    p = exp_m * q
    return ClosedForm(
        margin=np.log(exp_m),
        gradient_norm=np.sqrt(k - 1) * q,
        top=p * q,
        rest=q / k,
    )


def with_bias(inputs: Array) -> Array:
    """The inputs with one more column of ones (n, d + 1): its weights are the biases."""
    return np.hstack([inputs, np.ones((len(inputs), 1))])


def probabilities(theta: Array, inputs: Array) -> Array:
    """Class probabilities (n, k)."""
    return _softmax(inputs @ theta.T)


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def loss_and_gradient(theta: Array, inputs: Array, labels: NDArray) -> tuple[float, Array]:
    """Mean cross-entropy and its gradient (k, d)."""
    p = probabilities(theta, inputs)
    rows = np.arange(len(labels))
    loss = -np.log(np.maximum(p[rows, labels], np.finfo(float).tiny)).mean()
    p[rows, labels] -= 1.0
    return float(loss), p.T @ inputs / len(labels)


def spectrum(theta: Array, inputs: Array) -> tuple[Array, Array]:
    r"""All eigenvalues (min(nk, kd),) of the Hessian that can differ from 0, largest first, with eigenvectors (kd, ·).

    :math:`H = FF^\top` with the columns :math:`(D_a - p_a \sqrt{p_a}^\top)\otimes x_a/\sqrt n`,
    :math:`D_a = \mathrm{diag}(\sqrt{p_a})`: the eigenpairs come from the nk x nk matrix :math:`F^\top F`.
    """
    n, d = inputs.shape
    p = probabilities(theta, inputs)
    k = p.shape[1]
    root = np.sqrt(p)
    half = np.eye(k) * root[:, :, None] - p[:, :, None] * root[:, None, :]  # (n, k, k): half half^T = diag(p) - p p^T
    factor = np.einsum("acb,ai->ciab", half, inputs).reshape(k * d, n * k) / np.sqrt(n)
    if n * k > k * d:
        values, vectors = np.linalg.eigh(factor @ factor.T)
        return values[::-1], vectors[:, ::-1]
    values, coefficients = np.linalg.eigh(factor.T @ factor)
    values, coefficients = values[::-1], coefficients[:, ::-1]
    scale = np.sqrt(np.maximum(values, np.finfo(float).tiny))
    return values, factor @ coefficients / scale


def descend(
    theta: Array, inputs: Array, labels: NDArray, lr: float, steps: Iterable[int]
) -> Iterator[tuple[int, Array]]:
    """Full-batch gradient descent from ``theta``; yields (step, theta) at the increasing ``steps``.

    All steps lie in the span of the examples, so the logits and the examples' coefficients are followed instead of
    the parameters: a step then costs n² k, not n d k.
    """
    n, k = len(labels), len(theta)
    gram, logits = inputs @ inputs.T, inputs @ theta.T
    coefficients, targets = np.zeros((n, k)), np.eye(k)[labels]
    done = 0
    for step in steps:
        if step < done:
            raise ValueError(f"steps must increase, got {step} after {done}")
        for _ in range(step - done):
            move = (lr / n) * (targets - _softmax(logits))
            logits += gram @ move
            coefficients += move
        done = step
        yield step, theta + coefficients.T @ inputs
