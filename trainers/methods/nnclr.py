"""NNCLR (Dwibedi et al., arXiv:2104.14548): an image's positive is its nearest neighbour among past projections."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from kernels import SupportSet
from pipelines.batch import ViewBatch
from trainers.encoders import feature_width
from trainers.heads import PredictorConfig, build_predictor, build_projector
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.neighbours import NeighbourProjector, class_labels, embed_and_predict, masked_means, neighbour_loss
from trainers.similarity import view_similarities


class Config(MethodConfig):
    name: Literal["nnclr"] = "nnclr"
    temperature: float = Field(0.1, gt=0)
    queue_size: int = Field(98_304, ge=1)  # projections kept to search among; until there are as many, see `Method`
    enqueue: Literal["first", "both"] = "first"  # the views whose projections the queue takes
    exclude_same_image: bool | None = None  # whether an image's own past projections are skipped; None: not faithful
    projector: NeighbourProjector = NeighbourProjector()
    predictor: PredictorConfig = PredictorConfig()
    # As the seed's code: the queue begins as Gaussian noise and is searched from the first step, its size may exceed
    # the training images', and an image may find itself.
    faithful: bool = False

    @property
    def excludes(self) -> bool:
        return not self.faithful if self.exclude_same_image is None else self.exclude_same_image

    def check(self, *, images: int, batch_size: int, image_size: int) -> None:
        super().check(images=images, batch_size=batch_size, image_size=image_size)
        if self.queue_size > images and not self.faithful:
            raise ValueError(
                f"method.queue_size={self.queue_size} is larger than the {images} training images: neighbours would be"
                f" older embeddings of the same image; at most {images}"
            )


class Method(BaseMethod):
    """Until the queue is full an image's own projection, without gradient, stands for its neighbour."""

    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.temperature, self.excludes = config.temperature, config.excludes
        self.enqueued_views = {"first": 1, "both": 2}[config.enqueue]
        self.encoder = encoder
        width = config.projector.output
        self.projector = build_projector(config.projector, feature_width(encoder))
        self.predictor = build_predictor(config.predictor, width)
        self.support = SupportSet(config.queue_size, width)
        if config.faithful:
            unknown = torch.full((config.queue_size,), -1)
            self.support.enqueue(torch.randn(config.queue_size, width), unknown, unknown)

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D], p [2, N, D]."""
        return embed_and_predict(self.encoder, self.projector, self.predictor, views)

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        z = embeddings["z"].detach()
        positive, negative = view_similarities(z[0], z[1], group)
        anchors, found = self._neighbours(z, batch)
        loss, hits = neighbour_loss(anchors, embeddings["p"], temperature=self.temperature, group=group)
        return {
            "loss": loss,
            "positive_similarity": positive,
            "negative_similarity": negative,
            "queue_filled": hits.new_full((), self.support.filled / self.support.capacity, dtype=torch.float32),
            **masked_means({"contrastive_accuracy": (hits, torch.ones_like(hits))} | found, group),
        }

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        views = self.enqueued_views
        # Image by image, so that the order does not depend on how the batch is spread over ranks.
        rows = embeddings["z"][:views].transpose(0, 1).flatten(0, 1)
        ids, labels = (values.repeat_interleave(views) for values in (batch.indices, class_labels(batch)))
        self.support.enqueue(rows, ids, labels, group)

    @torch.no_grad()
    def _neighbours(self, z: Tensor, batch: ViewBatch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The neighbours of z [2, N, D], as [2, N, D], and what to log of them: values [2N] and which of them count."""
        if not self.support.is_full:
            return z, {}
        rows, ids, labels = z.flatten(0, 1), batch.indices.repeat(2), class_labels(batch).repeat(2)
        cosines, indices = self.support.nearest(rows, exclude_ids=ids if self.excludes else None)
        cosines, indices = cosines.squeeze(1), indices.squeeze(1)
        found = indices >= 0  # else all of the queue is the image's own
        neighbours = torch.where(found[:, None], self.support.rows[indices].to(rows.dtype), rows)
        theirs = self.support.labels[indices]
        return neighbours.view_as(z), {
            "neighbour_similarity": (cosines, found),
            "neighbour_age": (self.support.age(indices) + 1, found),  # in steps: 1 is the step before
            "neighbour_same_class": (theirs == labels, found & (theirs >= 0) & (labels >= 0)),
        }
