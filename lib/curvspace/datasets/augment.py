"""Augmentation of a minibatch as one tensor operation on the device, with its own generator."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_flip(
    images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True, border: str = "zero"
) -> Tensor:
    """A random crop of each image out of itself with a border of ``padding`` pixels, then a random mirror image.

    Parameters
    ----------
    images
        (N, C, H, W), of any type (uint8 as kept in a data set).
    generator
        On the images' device; all that is random comes from it.
    padding
        Each image is shifted by −padding … padding pixels, each way with the same probability.
    flip
        Mirror left and right with probability 1/2.
    border
        "zero": black; "reflect": mirrored without repeating the edge pixel.

    Raises
    ------
    ValueError
        If ``border`` is unknown, or ``padding`` negative or not less than the image.
    """
    count, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding must be at least 0 and less than the image's size, got {padding}")
    if border not in ("zero", "reflect"):
        raise ValueError(f"border must be 'zero' or 'reflect', got {border!r}")
    device = images.device
    shift = torch.randint(-padding, padding + 1, (2, count, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + shift[0]
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shift[1]
    rows, rows_inside = _inside(rows, height)
    columns, columns_inside = _inside(columns, width)
    # Two gathers, row-wise and column-wise, instead of a padded copy of the images.
    out = images.gather(2, rows[:, None, :, None].expand(count, channels, height, width))
    out = out.gather(3, columns[:, None, None, :].expand(count, channels, height, width))
    if border == "zero":
        out = out * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])
    return out


def _inside(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The index reflected into 0 … size − 1, and where it was inside already."""
    reflected = index.abs()
    reflected = torch.where(reflected >= size, 2 * (size - 1) - reflected, reflected)
    return reflected, (index >= 0) & (index < size)
