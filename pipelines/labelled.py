"""Labelled images for supervised training: every one once an epoch, as one augmented view, however few there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.choice import build_loader, choose
from pipelines.config import LoaderConfig
from pipelines.draw import permutation
from pipelines.loading import StreamedLoader, render
from pipelines.packed.images import BetonImages
from pipelines.resident import ResidentLoader
from pipelines.sources import DataError, Source
from pipelines.views import PLANS, View


def training_view(source: str) -> View:
    """Of supervised training: a random resized crop, half of them mirrored; digits as in their plan, never mirrored."""
    usual = PLANS["digits"][0] if source == "digits" else View(flip=0.5)
    return View(crop="random_resized", crop_scale=usual.crop_scale, flip=usual.flip)


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Positions of each step of an epoch: every image once, in batches whose sizes differ by at most one.

    No image is left out, none weighs much more than another, and no batch is of one image, with which BatchNorm
    cannot be trained.
    """
    count = steps_of_epoch(images, batch_size)
    return list(permutation(seed, epoch, images).tensor_split(count))


def steps_of_epoch(images: int, batch_size: int) -> int:
    """Steps of an epoch over at least two images."""
    return min(-(-images // batch_size), images // 2)


class LabelledViews:
    """Batches of augmented views of labelled images, through the project's own loaders.

    Raises:
        DataError: fewer than two images, or no loader can read them.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        loading: LoaderConfig | None = None,
    ) -> None:
        if len(source) < 2:
            raise DataError(f"{source.name}: {len(source)} labelled images; BatchNorm needs at least two to be trained")
        self.images, self.batch_size, self.seed, self.device = len(source), batch_size, seed, device
        self.steps_per_epoch = steps_of_epoch(len(source), batch_size)
        config = (loading or LoaderConfig()).model_copy(update={"reader": "ours", "order": "random"})
        if config.loader == "ffcv" and not isinstance(source.images, BetonImages):
            config = config.model_copy(update={"loader": "auto"})
        name, _ = choose(source, config, size, device)
        largest = -(-len(source) // self.steps_per_epoch)
        self.loader = build_loader(
            name, source, (view,), config=config, size=size, batch_size=largest, seed=seed, device=device
        )

    def epoch(self, epoch: int) -> Iterator[ViewBatch]:
        """Each step's batch."""
        shares, loader = epoch_batches(self.images, self.batch_size, self.seed, epoch), self.loader
        if isinstance(loader, ResidentLoader):
            yield from (loader.views(share, epoch) for share in shares)
            return
        assert isinstance(loader, StreamedLoader)
        with closing(loader.on_device(loader.crops(epoch, shares))) as batches:
            for made in batches:
                yield render(loader.source, loader.plan, made.crops, made.indices, seed=self.seed, epoch=epoch)

    def close(self) -> None:
        self.loader.close()
