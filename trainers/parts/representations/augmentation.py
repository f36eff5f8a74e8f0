"""Images augmented once more, where they are: each by its own draw, a pure function of step and index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import crop_resize, photometric
from kernels.transfer import to_device
from pipelines.policies import apply_policies
from pipelines.views import View, draw_boxes, draw_photometric

_SALT = 0x2303_12130  # added to the run's seed: these draws share none with the views


class Augmentation(View):
    """What is done to an image for its augmented_… representations: by default MV-MR's augmented view."""

    crop: Literal["random_resized", "pad_and_crop", "whole", "center"] = "random_resized"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2
    blur: float = 1.0


def augment_again(
    images: Tensor, view: View, *, mean: Sequence[float], std: Sequence[float], seed: int, step: int, indices: Tensor
) -> Tensor:
    """Crop, flip, colour and blur (as `view` says) a batch of square views that were not augmented yet.

    Normalisation is taken back first, so crops and colours work on the pixels that the images came from: 8-bit
    values, which rounding finds again exactly (float32) and which anything else is rounded to.

    Args:
        images: [N, 3, H, H] normalised.
        view: what to do.
        seed: of the run.
        step: from 0. With it and `indices`, [N] int64 positions in the source, draws are the same on any number of
            ranks and after a resume. Best on the CPU, where parameters are drawn.

    Returns:
        [N, 3, H, H] float32, normalised, channels_last.
    """
    size = images.shape[-1]
    scale, shift = to_device(torch.tensor([std, mean]).mul_(255).view(2, 3, 1, 1), images.device).unbind()
    pixels = (images.float() * scale + shift).round_().clamp_(0, 255).to(torch.uint8)
    indices = indices.cpu()
    draw: dict[str, Any] = {"seed": (seed + _SALT) % 2**62, "epoch": step, "indices": indices}
    extents = torch.full_like(indices, size)
    boxes = draw_boxes(view, **draw, view_index=0, heights=extents, widths=extents, size=size)
    crops = crop_resize(pixels.permute(0, 2, 3, 1), boxes, size)
    if view.policy != "none":
        crops = apply_policies((view,), crops[None], **draw)[0]
    return photometric(crops, draw_photometric(view, **draw, view_index=0, size=size), mean=mean, std=std)
