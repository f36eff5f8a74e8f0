"""Histograms of oriented gradients (Dalal & Triggs, CVPR 2005), a channel at a time and without block normalisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.parts.representations.chunks import in_chunks

BINS, CELL = 24, 8


def oriented_gradients(images: Tensor, seed_bins: bool = False) -> Tensor:
    """How strong the edges of each direction are, in cells of 8 x 8 pixels.

    A pixel's gradient is Sobel's; beyond the border its last pixel goes on. Its magnitude is divided over the two of
    24 directions of the half turn that are nearest to its own, in proportion to how near they are.

    Args:
        images: [N, C, H, W] float32 or float64.
        seed_bins: as the code published with arXiv:2303.12130 divides it: all to the lower direction and, to the
            upper one, 1 minus the magnitude.

    Returns:
        [N, C * 24, H / 8, W / 8], rounded up: the mean over a cell's pixels, fewer in the last where 8 does not divide.
    """
    of_pixels = images[0].numel() * BINS * images.element_size()  # histograms, before they are averaged over cells
    return in_chunks(lambda part: _of_cells(part, seed_bins), images, of_pixels)


def _of_cells(images: Tensor, seed_bins: bool) -> Tensor:
    across, down = _sobel(images)
    magnitude = torch.sqrt(across * across + down * down)[:, :, None]
    position = torch.atan2(across, down)[:, :, None] * (BINS / math.pi)  # from -24 to 24: opposite directions are one
    lower = position.floor()
    first = lower.long().remainder(BINS)
    histograms = magnitude.new_zeros(*images.shape[:2], BINS, *images.shape[2:])
    if seed_bins:
        histograms.scatter_(2, first, magnitude)
        histograms.scatter_add_(2, position.ceil().long().remainder(BINS), 1 - magnitude)
    else:
        share = position - lower
        histograms.scatter_(2, first, magnitude * (1 - share))
        histograms.scatter_(2, (first + 1).remainder(BINS), magnitude * share)
    return F.avg_pool2d(histograms.flatten(1, 2), CELL, ceil_mode=True)


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences from left to right and from top to bottom, smoothed the other way. Not a convolution: on a GPU its
    products may be TF32."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]
