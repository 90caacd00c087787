"""The losses with closed-form derivatives in the outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvspace.losses.base import KnownLoss, Reduction
from curvspace.outputs import logits


class CrossEntropy(KnownLoss):
    r"""Softmax cross-entropy: all of ``torch.nn.functional.cross_entropy``.

    .. math:: L = -\tfrac1W \sum_{n,c} t_{nc} \log p_{nc}, \qquad
              \partial_z L = \tfrac1W (s\,p - t), \qquad
              H_L u = \tfrac{s}{W}\,(p\circ u - p\,(p^\top u)), \qquad s_n = \sum_c t_{nc},

    with p the softmax of z and t the targets after class weights w and smoothing. Outputs (N, C) or (N, C, ...).
    Targets: integers of any type (N, ...), then W is the sum of their class weights, or probabilities of the outputs'
    shape, then W is the number of positions. Labels equal to ``ignore_index`` do not count. Where none counts, L is NaN
    and its derivatives are 0.
    """

    name = "cross_entropy"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ):
        super().__init__(reduction)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.class_weight = weight
        self.ignore_index = ignore_index

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = logits(outputs)
        y = targets if targets.is_floating_point() else targets.long()
        return F.cross_entropy(
            z,
            y,
            _like(self.class_weight, z),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def normaliser(self, targets: Tensor) -> Tensor | int:
        if targets.is_floating_point():
            return targets.numel() // targets.shape[min(1, targets.ndim - 1)]
        return self._label_weights(targets, self.class_weight).sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        dim = min(1, outputs.ndim - 1)
        t = self._soft_targets(outputs, targets)
        return (outputs.softmax(dim) * t.sum(dim, keepdim=True) - t) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        dim = min(1, outputs.ndim - 1)
        p = outputs.softmax(dim)
        pu = p * u
        return (pu - p * pu.sum(dim, keepdim=True)) * self.position_weights(outputs, targets).unsqueeze(dim)

    def position_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """s/W, one number an example and position: how much of the model's own Fisher matrix there is in H_L."""
        return self._row_weights(outputs, targets) / self._divisor(targets)

    def _label_weights(self, labels: Tensor, class_weight: Tensor | None) -> Tensor:
        """The weight of each label: zero for ignored ones."""
        labels = labels.long()  # in a shorter type another label may equal ignore_index
        counts = labels != self.ignore_index
        if class_weight is None:
            return counts
        w = class_weight.to(labels.device)
        return w[torch.where(counts, labels, 0)] * counts

    def _soft_targets(self, z: Tensor, targets: Tensor) -> Tensor:
        """t, the shape of z."""
        dim, c, smoothing = min(1, z.ndim - 1), z.shape[min(1, z.ndim - 1)], self.label_smoothing
        w = _like(self.class_weight, z)
        if targets.is_floating_point():
            t = targets.to(z.dtype)
            counts = None
        else:
            labels = targets.long()
            counts = labels != self.ignore_index
            t = F.one_hot(torch.where(counts, labels, 0), c).movedim(-1, dim).to(z.dtype)
        if smoothing:
            t = (1 - smoothing) * t + smoothing / c
        if w is not None:
            t = t * w.view(-1, *[1] * (z.ndim - 1 - dim))
        return t if counts is None else t * counts.unsqueeze(dim)

    def _row_weights(self, z: Tensor, targets: Tensor) -> Tensor:
        """s, one number an example and position."""
        if targets.is_floating_point():
            return self._soft_targets(z, targets).sum(min(1, z.ndim - 1))
        w = _like(self.class_weight, z)
        s = self._label_weights(targets, w).to(z.dtype)
        if w is not None and self.label_smoothing:
            smooth = (self.label_smoothing / len(w)) * w.sum() * (targets.long() != self.ignore_index)
            s = (1 - self.label_smoothing) * s + smooth
        return s


class NegativeLogLikelihood(KnownLoss):
    r"""``nll_loss`` on log-probabilities: :math:`L = -\tfrac1W \sum_n w_{y_n} z_{n y_n}`.

    Linear in the outputs, so :math:`H_L = 0` and every Gauss-Newton matrix is zero by definition; the curvature of the
    log-softmax belongs to the model. For the usual matrix leave it out of the model and take ``"cross_entropy"``.
    """

    name = "nll_loss"
    linear = True

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean"):
        super().__init__(reduction)
        self._labels = CrossEntropy(0.0, weight, ignore_index, reduction)

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z, labels = logits(outputs), self._labels
        w = _like(labels.class_weight, z)
        y = targets if targets.is_floating_point() else targets.long()
        return F.nll_loss(z, y, w, ignore_index=labels.ignore_index, reduction=self.reduction)

    def normaliser(self, targets: Tensor) -> Tensor | int:
        return self._labels.normaliser(targets)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self._labels._soft_targets(outputs, targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


class BinaryCrossEntropy(KnownLoss):
    r"""Sigmoid cross-entropy, mean over all entries: all of ``binary_cross_entropy_with_logits``.

    .. math:: \partial_z L = \tfrac{w}{W}\,(a\,\sigma(z) - \pi y), \qquad
              H_L u = \tfrac{w}{W}\,a\,\sigma(z)(1-\sigma(z))\,u, \qquad a = \pi y + 1 - y,

    with w the ``weight`` and :math:`\pi` the ``pos_weight`` (broadcast to the outputs), W the number of entries.
    """

    name = "binary_cross_entropy_with_logits"

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: Reduction = "mean"):
        super().__init__(reduction)
        self.entry_weight, self.pos_weight = weight, pos_weight

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = logits(outputs)
        w, pi = _like(self.entry_weight, z), _like(self.pos_weight, z)
        y = targets.to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, y, w, pos_weight=pi, reduction=self.reduction)

    def adds_up(self, targets: Tensor) -> bool:
        """Not where weights of single examples came with the loss: they cannot be cut along."""
        return not any(
            w is not None and w.ndim == targets.ndim and w.ndim > 0 and w.shape[0] > 1
            for w in (self.entry_weight, self.pos_weight)
        )

    def normaliser(self, targets: Tensor) -> int:
        return targets.numel()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        w, pi, y = self._factors(outputs, targets)
        return w * ((pi * y + 1 - y) * outputs.sigmoid() - pi * y)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        w, pi, y = self._factors(outputs, targets)
        p = outputs.sigmoid()
        return w * (pi * y + 1 - y) * p * (1 - p) * u

    def _factors(self, z: Tensor, targets: Tensor) -> tuple[Any, Any, Tensor]:
        w, pi = _like(self.entry_weight, z), _like(self.pos_weight, z)
        divisor = self._divisor(targets)
        return (1 / divisor if w is None else w / divisor), (1 if pi is None else pi), targets.to(z.dtype)


class SquaredError(KnownLoss):
    r"""Half the squared distance, mean over examples.

    .. math:: L = \frac1N\sum_n \tfrac12|z_n - y_n|^2, \qquad H_L = I/N
    """

    name = "mse"

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = _same_shape(self.name, logits(outputs), targets)
        return 0.5 * (z - targets).square().sum() / self._divisor(targets)

    def normaliser(self, targets: Tensor) -> int:
        return targets.shape[0]

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return u / self._divisor(targets)


class MeanSquaredError(KnownLoss):
    r"""torch's ``mse_loss``: the mean over all entries, without the half; :math:`H_L = 2I/W`, W entries."""

    name = "mse_loss"

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        z = _same_shape(self.name, logits(outputs), targets)
        return (z - targets).square().sum() / self._divisor(targets)

    def normaliser(self, targets: Tensor) -> int:
        return targets.numel()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * (outputs - targets) / self._divisor(targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return 2 * u / self._divisor(targets)


KNOWN: dict[str, type[KnownLoss]] = {
    kind.name: kind
    for kind in (CrossEntropy, SquaredError, MeanSquaredError, BinaryCrossEntropy, NegativeLogLikelihood)
}


def _like(weight: Tensor | None, z: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(z.device, z.dtype)


def _same_shape(name: str, z: Tensor, targets: Tensor) -> Tensor:
    if z.shape != targets.shape:  # broadcasting (N, 1) against (N,) would be wrong without a word
        raise ValueError(f"{name} needs targets of shape {tuple(z.shape)}, got {tuple(targets.shape)}")
    return z
