"""Images as evaluation sees them: the central square, resized and normalised, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from kernels import PhotometricParams, crop_resize, photometric
from pipelines.sources import Source
from pipelines.views import center_boxes

_SMALL = 64  # small images are shown whole; larger ones lose their rim, as in the field's 256 -> 224


def plain_batches(source: Source, size: int, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images [B, 3, size, size] normalised channels_last, positions [B]) over the whole source, in order."""
    outer = size if size <= _SMALL else round(size * 256 / 224)
    rim = (outer - size) // 2
    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(source.images), batch_size):
            positions = torch.arange(start, min(start + batch_size, len(source.images)))
            canvas, sizes = stack_images(source, positions, pool)
            boxes = center_boxes(sizes[:, 0], sizes[:, 1])
            resized = crop_resize(canvas.to(device), boxes, outer, sizes=sizes)
            crops = resized[:, rim : rim + size, rim : rim + size].contiguous()
            params = PhotometricParams.identity(len(positions))
            yield photometric(crops, params, mean=source.mean, std=source.std), positions


def stack_images(
    source: Source, positions: Tensor, pool: ThreadPoolExecutor, max_side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images at ``positions`` on one canvas [B, H, W, 3] uint8, padded at the bottom and right; true sizes [B, 2].

    Images with a side beyond ``max_side`` are reduced (antialiased) to it.
    """
    array = source.images.select(positions.numpy()).array  # None for files; else of these images alone
    if array is not None and (max_side is None or max(array.shape[1:3]) <= max_side):
        return torch.from_numpy(array), torch.tensor(array.shape[1:3]).expand(len(positions), 2)
    images = list(pool.map(lambda i: _reduced(source.images[i], max_side), positions.tolist()))
    sizes = torch.tensor([image.shape[:2] for image in images]).reshape(-1, 2)
    height, width = sizes.amax(0).tolist()
    canvas = np.zeros((len(images), height, width, 3), np.uint8)
    for row, image in enumerate(images):
        canvas[row, : image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas), sizes


def _reduced(image: np.ndarray, max_side: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return image
    from PIL import Image

    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
