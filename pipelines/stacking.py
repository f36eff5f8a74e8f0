"""Images of different sizes on one canvas."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.sources import Source


def stack_images(
    source: Source, positions: Tensor, pool: ThreadPoolExecutor, max_side: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images at ``positions`` on one canvas [B, H, W, 3] uint8, padded at the bottom and right; their sizes [B, 2]
    there and as they are stored.

    Images with a side beyond ``max_side`` are reduced (antialiased) to it.
    """
    array = source.images.select(positions.numpy()).array  # None for files; else of these images alone
    if array is not None and (max_side is None or max(array.shape[1:3]) <= max_side):
        sizes = torch.tensor(array.shape[1:3]).expand(len(positions), 2)
        return torch.from_numpy(array), sizes, sizes
    pairs = list(pool.map(lambda i: _reduced(source.images[i], max_side), positions.tolist()))
    images, shapes = [image for image, _ in pairs], [shape for _, shape in pairs]
    sizes = torch.tensor([image.shape[:2] for image in images]).reshape(-1, 2)
    height, width = sizes.amax(0).tolist()
    canvas = np.zeros((len(images), height, width, 3), np.uint8)
    for row, image in enumerate(images):
        canvas[row, : image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas), sizes, torch.tensor(shapes).reshape(-1, 2)


def _reduced(image: np.ndarray, max_side: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    """The image within `max_side`, and its (height, width) before."""
    height, width = image.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return image, (height, width)
    from PIL import Image

    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)), (height, width)
