r"""Contrast normalisation of each image and whitening of all pixels, as paper C's authors' program prepares CIFAR-10.

With m the mean of the training images and s(a) the standard deviation of an image's entries,

.. math::
    a = x - m - \mathrm{mean}(x - m), \qquad
    b = a\,\bar s / \max(s(a), 40), \qquad
    z = V\,\mathrm{diag}\big(\sqrt{\bar d} / \max(\sqrt{d_i}, 10)\big)\,V^\top b,

where :math:`\bar s` is the mean of s(a) over the training images, :math:`V\,\mathrm{diag}(d)\,V^\top` the second moment
:math:`\frac1n\sum b b^\top` of theirs and :math:`\bar d` the mean of d. Pixels count from 0 to 255, and z is of their
order. (Contrast: Coates, Lee and Ng 2011; the bounds 40 and 10 are the program's.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_CONTRAST = 40.0
LEAST_SPREAD = 10.0
PART = 10_000
"""Images at a time, for the memory's sake."""


def whitener(images: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """The map from uint8 images (N, C, H, W) to whitened ones of type ``dtype`` that the training ``images`` determine.

    Raises
    ------
    ValueError
        If there is no training image.
    """
    if not len(images):
        raise ValueError("whitening needs training images")
    shape, count = images.shape[1:], len(images)
    mean = sum(part.flatten(1).sum(0, dtype=torch.float64) for part in images.split(PART)) / count

    def centred(part: Tensor) -> Tensor:
        a = part.flatten(1).to(dtype).sub_(mean.to(dtype))
        return a.sub_(a.mean(1, keepdim=True))

    contrast = sum(float(centred(part).std(1).sum(dtype=torch.float64)) for part in images.split(PART)) / count

    def even(part: Tensor) -> Tensor:
        a = centred(part)
        return a.mul_(contrast / a.std(1, keepdim=True).clamp(min=LEAST_CONTRAST))

    moment = torch.zeros(mean.numel(), mean.numel(), dtype=torch.float64)
    for part in images.split(PART):
        b = even(part)
        moment += (b.T @ b).to(torch.float64)
    d, v = torch.linalg.eigh(moment / count)
    d = d.clamp(min=0)
    scale = d.mean().sqrt() / d.sqrt().clamp(min=LEAST_SPREAD)
    matrix = ((v * scale) @ v.T).to(dtype)

    def whiten(given: Tensor) -> Tensor:
        parts = [even(part) @ matrix for part in given.split(PART)]
        return torch.cat(parts).view(-1, *shape) if parts else given.to(dtype)

    return whiten
