"""The random numbers of a batch of views, drawn on the device that uses them: nothing waits, all can be captured.

`pipelines.views` draws the same distributions from a counter, so that a run can be resumed in mid-epoch. A speedrun
is not resumed, and the counter's epoch is a number of the host, which a CUDA graph would hold fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.speedrun.recipe import Recipe
from kernels.photometric import PhotometricParams

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_RATIO = (3 / 4, 4 / 3)


def draw_boxes(count: int, side: int, least: float, device: torch.device) -> Tensor:
    """[count, 4] int64 (top, left, height, width): random resized crops of square images, from a share `least` up."""
    u = torch.rand(count, 2 * _ATTEMPTS + 2, device=device)
    area = side * side * (least + (1 - least) * u[:, :_ATTEMPTS])
    low, high = (math.log(ratio) for ratio in _RATIO)
    ratio = (low + (high - low) * u[:, _ATTEMPTS : 2 * _ATTEMPTS]).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths >= 1) & (heights >= 1) & (widths <= side) & (heights <= side)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fitted = fits.any(1)
    height = torch.where(fitted, heights.gather(1, first)[:, 0], float(side))
    width = torch.where(fitted, widths.gather(1, first)[:, 0], float(side))
    top, left = (u[:, -2] * (side - height + 1)).floor(), (u[:, -1] * (side - width + 1)).floor()
    # A float32 just below 1 may be rounded up by the product.
    top, left = torch.minimum(top, side - height), torch.minimum(left, side - width)
    return torch.stack([top, left, height, width], 1).to(torch.int64)


def draw_colours(count: int, recipe: Recipe, device: torch.device) -> PhotometricParams:
    """SimCLR's jitter with probability 0.8, in a random order; grey and flip as the recipe says; no blur."""
    u = torch.rand(7, count, device=device)
    strength = 0.8 * recipe.colours
    low = max(0.0, 1 - strength)
    brightness, contrast, saturation = low + u[:3] * (1 + strength - low)
    no = torch.zeros(count, dtype=torch.bool, device=device)
    return PhotometricParams(
        flip=u[3] < recipe.flip,
        jitter=u[4] < 0.8,
        order=torch.rand(count, 4, device=device).argsort(1),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=0.2 * recipe.colours * (2 * u[5] - 1),
        grayscale=u[6] < recipe.grey,
        blur_sigma=torch.zeros(count, device=device),
        solarize=no,
        blur_kernel=1,
    )
