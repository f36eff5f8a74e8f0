"""Images as evaluation sees them: the central square, resized and normalised, in batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from kernels import PhotometricParams, crop_resize, photometric
from pipelines.choice import streamed_loader
from pipelines.config import LoaderConfig
from pipelines.sources import ArrayImages, Source
from pipelines.stacking import stack_images
from pipelines.views import View, center_boxes

_SMALL = 64  # small images are shown whole; larger ones lose their rim, as in the field's 256 -> 224


def plain_batches(
    source: Source, size: int, batch_size: int, device: torch.device, config: LoaderConfig | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield (images [B, 3, size, size] normalised channels_last, positions [B]) over the whole source, in order.

    Files and shards come through the loader that `config` names; arrays are cut where the model is.
    """
    outer = _outer(size)
    rim = (outer - size) // 2
    for squares, positions in _central_squares(source, outer, batch_size, device, config or LoaderConfig()):
        yield _cut(squares, rim, rim, size, source), positions


def ten_crop_batches(
    source: Source, size: int, batch_size: int, device: torch.device, config: LoaderConfig | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `plain_batches`, (images [crops, B, 3, size, size], positions [B]): the middle and the four corners of the
    central square, and their mirror images. Small images are shown whole: two crops, the image and its mirror."""
    outer = _outer(size)
    last, rim = outer - size, (outer - size) // 2
    corners = ((rim, rim), (0, 0), (0, last), (last, 0), (last, last)) if last else ((0, 0),)
    for squares, positions in _central_squares(source, outer, batch_size, device, config or LoaderConfig()):
        crops = torch.stack([_cut(squares, top, left, size, source) for top, left in corners])
        yield torch.cat([crops, crops.flip(-1)]), positions


def _outer(size: int) -> int:
    return size if size <= _SMALL else round(size * 256 / 224)


def _cut(squares: Tensor, top: int, left: int, size: int, source: Source) -> Tensor:
    """[B, outer, outer, 3] uint8 -> [B, 3, size, size] normalised, channels_last."""
    inner = squares[:, top : top + size, left : left + size].contiguous()
    params = PhotometricParams.identity(len(squares))
    return photometric(inner, params, mean=source.mean, std=source.std)


def _central_squares(
    source: Source, size: int, batch_size: int, device: torch.device, config: LoaderConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """(crops [B, size, size, 3] uint8 on the device, positions [B])."""
    batches = torch.arange(len(source)).split(batch_size)
    if isinstance(source.images, ArrayImages):
        with ThreadPoolExecutor(max_workers=4) as pool:
            for positions in batches:
                canvas, sizes, _ = stack_images(source, positions, pool)
                boxes = center_boxes(sizes[:, 0], sizes[:, 1])
                yield crop_resize(canvas.to(device), boxes, size, sizes=sizes), positions
        return
    settings: dict[str, Any] = {"size": size, "batch_size": 1, "seed": 0, "device": device}
    loader = streamed_loader(source, (View(crop="center"),), config=config, **settings)
    try:
        with closing(loader.on_device(loader.crops(0, batches))) as made:
            for batch in made:
                yield batch.crops[0], batch.indices
    finally:
        loader.close()
