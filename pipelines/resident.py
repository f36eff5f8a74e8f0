"""Small sets: every image lives on the training device, and views are cut and coloured there in batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch
from torch import Tensor

from kernels import crop_resize, photometric
from pipelines.batch import ViewBatch
from pipelines.draw import permutation
from pipelines.plain_views import stack_images
from pipelines.sources import DataError, Source
from pipelines.views import View, draw_boxes, draw_photometric


class ResidentLoader:
    """Batches of views from a set held as uint8 on ``device``.

    Each epoch is a new permutation; the last incomplete batch is dropped. A step's global batch is cut into
    ``world_size`` equal parts and each into ``accumulation`` micro-batches, so neither changes which images and
    draws a step sees. Images with a side beyond twice the view size are reduced to it once, at loading.
    """

    def __init__(
        self,
        source: Source,
        plan: tuple[View, ...],
        *,
        size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        """``size``: side of a view in pixels; ``batch_size``: images of all ranks together.

        Raises:
            DataError: the set is smaller than a batch, or does not fit into the device's memory.
            ValueError: the batch cannot be divided evenly.
        """
        if len(source.images) < batch_size:
            raise DataError(
                f"{source.name} has {len(source.images)} training images, fewer than batch_size={batch_size};"
                f" choose at most {len(source.images)}"
            )
        if batch_size % (world_size * accumulation):
            raise ValueError(
                f"batch_size={batch_size} cannot be divided over {world_size} ranks × {accumulation} micro-batches"
            )
        own_views = len(plan) * batch_size // world_size
        _check_memory(source, 2 * size, own_views * 3 * size * size * 4, device)
        self.source, self.plan, self.size, self.seed, self.device = source, plan, size, seed, device
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world_size = rank, world_size
        with ThreadPoolExecutor(max_workers=4) as pool:
            canvas, self.sizes = stack_images(source, torch.arange(len(source.images)), pool, 2 * size)
        self.canvas = canvas.to(device)
        self.labels = source.labels.to(device)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source.images) // self.batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[ViewBatch]]:
        """The micro-batches of each step of an epoch, from step ``first_step`` of it on."""
        order = permutation(self.seed, epoch, len(self.source.images))
        share = self.batch_size // self.world_size
        for step in range(first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.rank * share
            mine = order[start : start + share]
            yield [self.views(indices, epoch) for indices in mine.chunk(self.accumulation)]

    def views(self, indices: Tensor, epoch: int) -> ViewBatch:
        """All views of the images at ``indices`` [N], as this epoch draws them."""
        heights, widths = self.sizes[indices].unbind(1)
        rows = indices.to(self.device)
        views = torch.empty(
            (len(self.plan) * len(indices), 3, self.size, self.size),
            device=self.device,
            memory_format=torch.channels_last,
        )
        for number, view in enumerate(self.plan):
            draws: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "indices": indices, "view_index": number}
            boxes = draw_boxes(view, **draws, heights=heights, widths=widths, size=self.size)
            crops = crop_resize(self.canvas, boxes, self.size, rows=rows, sizes=self.sizes[indices])
            params = draw_photometric(view, **draws, size=self.size)
            views[number * len(indices) : (number + 1) * len(indices)] = photometric(
                crops, params, mean=self.source.mean, std=self.source.std
            )
        return ViewBatch(views.unflatten(0, (len(self.plan), len(indices))), self.labels[rows], rows)


def _check_memory(source: Source, max_side: int, batch_bytes: int, device: torch.device) -> None:
    height, width = source.images.size or (max_side, max_side)
    largest = min(max(height, width), max_side)
    needed = len(source) * min(height, largest) * min(width, largest) * 3 + batch_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise DataError(
            f"{source.name} may need {needed / 1e9:.1f} GB for its pixels and a batch of views, {device} has"
            f" {free / 1e9:.1f} GB free; use fewer images (data.limit, data.class_list) or smaller ones (views.size)"
        )
