"""Functions of images, a few images at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ON_CPU, _ON_GPU = 4 * 2**20, 256 * 2**20  # bytes of temporaries: on a CPU they stay in its cache


def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor, bytes_each: int) -> Tensor:
    """function(images), of so many images at a time that temporaries of `bytes_each` for an image stay small."""
    step = max(1, (_ON_GPU if images.device.type == "cuda" else _ON_CPU) // bytes_each)
    return torch.cat([function(part) for part in images.split(step)])
