"""Small sets: every image lives on the training device, and views are cut and coloured there in batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch
from torch import Tensor

from kernels import crop_resize, photometric
from kernels.transfer import to_device
from pipelines.batch import ViewBatch
from pipelines.config import LoaderConfig
from pipelines.loading import ranks_of_this_machine, refuse_state
from pipelines.order import EpochOrder
from pipelines.policies import apply_policies
from pipelines.sources import DataError, Source
from pipelines.stacking import stack_images
from pipelines.views import View, draw_plan_boxes, draw_plan_photometric


class ResidentLoader:
    """Batches of views from a set held as uint8 on ``device``.

    Each epoch is a new permutation (`EpochOrder`). A step's global batch is cut into ``world_size`` equal parts and
    each into ``accumulation`` micro-batches, so neither changes which images and draws a step sees. Images with a side
    beyond 2.5 times the view size are reduced to it once, at loading; boxes are drawn for them as they are stored.
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
        config: LoaderConfig | None = None,
    ) -> None:
        """``size``: side of a view in pixels; ``batch_size``: images of all ranks together.

        Raises:
            DataError: the set is smaller than a batch, or does not fit into the device's memory.
            ValueError: the batch cannot be divided evenly.
        """
        self.order = EpochOrder(
            len(source.images),
            batch_size,
            seed,
            name=source.name,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            config=config,
        )
        own_views = len(plan) * batch_size // world_size
        pixels = resident_bytes(source, size)
        if device.type == "cpu" and source.images.size is None:
            pixels *= 2  # a canvas that is too small for the next image is copied to a larger one
        needed, free = pixels + own_views * 3 * size * size * 4, free_bytes(device)
        if needed > 0.8 * free:
            raise DataError(
                f"{source.name} may need {needed / 1e9:.1f} GB for its pixels and a batch of views, {device} has"
                f" {free / 1e9:.1f} GB free; let it be decoded as it is needed (data.loader=auto), or use fewer images"
                " (data.limit, data.class_list) or smaller ones (views.size)"
            )
        self.source, self.plan, self.size, self.seed, self.device = source, plan, size, seed, device
        self.accumulation = accumulation
        with ThreadPoolExecutor(max_workers=4) as pool:
            everything = torch.arange(len(source.images))
            canvas, self.sizes, self.stored_sizes = stack_images(source, everything, pool, _largest_side(size))
        self.canvas = canvas.to(device)
        self.labels = source.labels.to(device)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[ViewBatch]]:
        """The micro-batches of each step of an epoch, from step ``first_step`` of it on."""
        for mine in self.order.shares(epoch, first_step):
            yield [self.views(indices, epoch) for indices in mine.chunk(self.accumulation)]

    def views(self, indices: Tensor, epoch: int) -> ViewBatch:
        """All views of the images at ``indices`` [N], as this epoch draws them."""
        draws: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "indices": indices}
        rows, sizes, stored = to_device(indices, self.device), self.sizes[indices], self.stored_sizes[indices]
        boxes = draw_plan_boxes(self.plan, **draws, heights=stored[:, 0], widths=stored[:, 1], size=self.size)
        if not torch.equal(sizes, stored):
            boxes = _scaled(boxes, sizes / stored)
        of_all_views = {"rows": rows.repeat(len(boxes)), "sizes": sizes.repeat(len(boxes), 1)}
        crops = crop_resize(self.canvas, boxes.flatten(0, 1), self.size, **of_all_views).unflatten(0, boxes.shape[:2])
        crops = apply_policies(self.plan, crops, **draws)
        params = draw_plan_photometric(self.plan, **draws, size=self.size)
        views = photometric(crops.flatten(0, 1), params, mean=self.source.mean, std=self.source.std)
        return ViewBatch(views.unflatten(0, crops.shape[:2]), self.labels[rows], rows, indices)

    def state(self) -> Tensor | None:
        return None

    def load_state(self, state: Tensor) -> None:
        refuse_state()

    def close(self) -> None: ...


def as_stored(source: Source, size: int) -> bool:
    """Whether the images can be held without being reduced."""
    shared = source.images.size
    return shared is not None and max(shared) <= _largest_side(size)


def resident_bytes(source: Source, size: int) -> int:
    """What the pixels of a set may take on the device, for views of ``size`` pixels."""
    most = _largest_side(size)
    height, width = source.images.size or (most, most)
    largest = min(max(height, width), most)
    return len(source) * min(height, largest) * min(width, largest) * 3


def _largest_side(size: int) -> int:
    """Of the images that are kept, pixels: at 224, photographs of ImageNet's usual 500 stay as they are."""
    return size * 5 // 2


def free_bytes(device: torch.device) -> int:
    """What this process may still use of the device's memory; CPUs are shared with the machine's other ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks_of_this_machine()


def _scaled(boxes: Tensor, factors: Tensor) -> Tensor:
    """Boxes [V, N, 4] in images that were reduced by ``factors`` [N, 2], to whole pixels."""
    start = (boxes[..., :2] * factors).round()
    end = ((boxes[..., :2] + boxes[..., 2:]) * factors).round()
    return torch.cat([start, (end - start).clamp(min=1)], dim=-1).to(torch.int64)
