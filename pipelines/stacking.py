"""Images of different sizes on one canvas."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from pipelines.jpeg.decoder import JpegError, jpeg_decoder
from pipelines.sources import Source
from pipelines.stored.images import Images

_BLOCK = 1024  # images decoded before they are put on the canvas: a set need never be in memory twice
_SMALL = 96 * 96  # pixels: up to here threads lose more by handing Python's lock over than they win by decoding


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
    canvas = np.zeros((len(positions), 0, 0, 3), np.uint8)
    shapes: list[tuple[int, int]] = []  # on the canvas
    stored: list[tuple[int, int]] = []
    shared = source.images.size
    for_all = map if shared is not None and shared[0] * shared[1] <= _SMALL else pool.map
    for block in positions.split(_BLOCK):
        pairs = list(for_all(lambda i: _reduced(_decoded(source.images, i), max_side), block.tolist()))
        sides = (max((image.shape[side] for image, _ in pairs), default=0) for side in (0, 1))
        canvas = _at_least(canvas, *sides, filled=len(shapes))
        for row, (image, _) in enumerate(pairs, len(shapes)):
            canvas[row, : image.shape[0], : image.shape[1]] = image
        shapes += [image.shape[:2] for image, _ in pairs]
        stored += [shape for _, shape in pairs]
    return torch.from_numpy(canvas), torch.tensor(shapes).reshape(-1, 2), torch.tensor(stored).reshape(-1, 2)


def _decoded(images: Images, index: int) -> np.ndarray:
    """``images[index]``, the same pixels: a JPEG by our own decoder where it can, in half the time."""
    if (decoder := jpeg_decoder()) is not None:
        data = images.read(index)
        if isinstance(data, np.ndarray) and data.ndim == 3:
            return data
        with suppress(JpegError):  # perhaps a PNG; if it is broken, the line below says so
            if decoder.header(data).orientation == 1:
                return decoder.decode(data)
    return images[index]


def _at_least(canvas: np.ndarray, height: int, width: int, *, filled: int) -> np.ndarray:
    """A canvas of these sides or more with the first ``filled`` rows of ``canvas``; itself where it is large enough."""
    height, width = max(height, canvas.shape[1]), max(width, canvas.shape[2])
    if (height, width) == canvas.shape[1:3]:
        return canvas
    larger = np.zeros((len(canvas), height, width, 3), np.uint8)
    larger[:filled, : canvas.shape[1], : canvas.shape[2]] = canvas[:filled]
    return larger


def _reduced(image: np.ndarray, max_side: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    """The image within `max_side`, and its (height, width) before."""
    height, width = image.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return image, (height, width)
    from PIL import Image

    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)), (height, width)
