"""Training a grid of linear heads on a frozen encoder, in one pass over the images for all of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.labelled import LabelledViews, training_view
from pipelines.sources import DataConfig, Source
from trainers.features import FrozenEncoder, frozen
from trainers.head_grid import HeadGrid
from trainers.linear import mean_and_scale

FeatureChoice = Literal["pooled", "standardised", "stages"]


class Stages(nn.Module):
    """The pooled output of the stage before the last beside the encoder's own features: [N, 3, H, W] -> [N, e + d]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        names = [name for name, _ in encoder.named_children() if name.startswith("layer")]
        self.before_last = names[-2]

    def forward(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        stage = self.encoder.get_submodule(self.before_last)
        hook = stage.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            features = self.encoder(images)
        finally:
            hook.remove()
        return torch.cat([F.adaptive_avg_pool2d(kept[0], 1).flatten(1), features], 1)


def with_stages(encoder: FrozenEncoder) -> FrozenEncoder:
    """The same encoder, giving the features of `Stages`."""
    assert encoder.module is not None
    return replace(encoder, module=Stages(encoder.module), identity=f"{encoder.identity}-stages")


class Choices:
    """The choices of features that heads read, from the rows that the encoder gives."""

    def __init__(self, names: tuple[str, ...], rows: Tensor, pooled_width: int) -> None:
        """rows [N, e + d] of the training images without augmentation: where "standardised" takes mean and std."""
        self.names, self.pooled_width = names, pooled_width
        self.mean, self.scale = mean_and_scale(rows[:, -pooled_width:])

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """rows [B, e + d] -> [B, width] by name."""
        pooled = rows[:, -self.pooled_width :]
        made = {"pooled": pooled, "standardised": (pooled - self.mean) / self.scale, "stages": rows}
        return {name: made[name] for name in self.names}


def cached_batches(
    rows: Tensor, labels: Tensor, batch_size: int, epoch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows [N, d] with their labels, shuffled by (seed, epoch); the last batch may be smaller."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**63)
    for chosen in torch.randperm(len(rows), generator=generator).to(rows.device).split(batch_size):
        yield rows[chosen], labels[chosen]


class AugmentedRows:
    """Features of augmented images, epoch by epoch: `training_view`.

    Args:
        epochs: of new draws; after them these are used again, from memory. None: never again.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        source: Source,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        epochs: int | None,
    ) -> None:
        self.encoder, self.device, self.epochs = encoder, device, epochs
        self.batch_size, self.seed = batch_size, seed
        self.views = LabelledViews(
            replace(source, mean=encoder.mean, std=encoder.std),
            training_view(source.name),
            size=encoder.image_size,
            batch_size=batch_size,
            seed=seed,
            device=device,
            loading=data,
        )
        self.kept: list[tuple[Tensor, Tensor]] = []

    @property
    def steps(self) -> int:
        return self.views.steps_per_epoch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.epochs is not None and epoch >= self.epochs:
            yield from cached_batches(*self.kept[epoch % self.epochs], self.batch_size, epoch, self.seed)
            return
        seen: list[tuple[Tensor, Tensor]] = []
        with frozen(self.encoder, self.device) as embed, torch.no_grad():
            for batch in self.views.epoch(epoch):
                rows = embed(batch.views[0])
                if self.epochs is not None:
                    seen.append((rows, batch.labels))
                yield rows, batch.labels
        if self.epochs is not None:
            self.kept.append((torch.cat([rows for rows, _ in seen]), torch.cat([labels for _, labels in seen])))

    def close(self) -> None:
        self.views.close()


def train_heads(
    heads: HeadGrid,
    choices: Choices,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    schedule: Literal["cosine", "constant"],
) -> None:
    """One step on each batch; cosine: from the learning rate to 0 over ``steps``."""
    for step, (rows, labels) in enumerate(batches):
        factor = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
        heads.step(choices(rows), labels, factor)
        if sys.stderr.isatty() and step % 50 == 0:
            print(f"\rheads: step {step:,}/{steps:,}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
