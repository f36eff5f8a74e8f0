"""KMCLR: NNCLR (arXiv:2104.14548) with the centres of an online k-means of the projections in place of its queue."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from trainers.encoders import feature_width
from trainers.heads import PredictorConfig, build_predictor, build_projector
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.neighbours import NeighbourProjector, class_labels, embed_and_predict, masked_means, neighbour_loss
from trainers.parts.prototypes import Prototypes
from trainers.similarity import view_similarities


class Config(MethodConfig):
    name: Literal["kmclr"] = "kmclr"
    temperature: float = Field(0.1, gt=0)
    centres: int = Field(400, ge=2)
    update: Literal["mean", "ema"] = "mean"  # of a centre's rows since it was seeded, or exponential moving average
    decay: float | None = Field(None, ge=0, lt=1)  # ema, a step: 0.99
    reseed_epochs: float = Field(3.0, ge=0)  # after so many all centres begin anew from the last projections; 0: never
    revive: bool | None = None  # whether centres that hardly get an image begin anew; None: not faithful
    projector: NeighbourProjector = NeighbourProjector()
    predictor: PredictorConfig = PredictorConfig()
    # As the seed's code: Euclidean k-means of projections that are not normalised, from centres drawn from U(0, 1)
    # that are used from the first step and hardly ever revived. Not spherical, from the first projections.
    faithful: bool = False

    @model_validator(mode="after")
    def _decay_is_for_ema(self) -> Config:
        if self.decay is not None and self.update != "ema":
            raise ValueError(f"decay={self.decay} is not used with update={self.update}; remove it, or set update=ema")
        return self

    def check(self, *, images: int, batch_size: int, image_size: int) -> None:
        super().check(images=images, batch_size=batch_size, image_size=image_size)
        if self.centres > images:
            raise ValueError(
                f"method.centres={self.centres} is larger than the {images} training images: some would be older"
                f" embeddings of the same image; at most {images}"
            )


class Method(BaseMethod):
    """Until there are centres an image's own projection, without gradient, stands for the nearest."""

    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.encoder = encoder
        width = config.projector.output
        self.projector = build_projector(config.projector, feature_width(encoder))
        self.predictor = build_predictor(config.predictor, width)
        reseed_every = max(1, round(config.reseed_epochs * facts.steps_per_epoch)) if config.reseed_epochs else 0
        self.prototypes = Prototypes(
            config.centres,
            width,
            classes=facts.classes,
            batch_size=facts.batch_size,
            metric="euclidean" if config.faithful else "cosine",
            decay=None if config.update == "mean" else 0.99 if config.decay is None else config.decay,
            reseed_every=reseed_every,
            revive=not config.faithful if config.revive is None else config.revive,
            uniform=config.faithful,
        )

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D], p [2, N, D]."""
        return embed_and_predict(self.encoder, self.projector, self.predictor, views)

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        z = embeddings["z"].detach()
        positive, negative = view_similarities(z[0], z[1], group)
        anchors, state, found = self._nearest_centres(z, batch, group)
        loss, hits = neighbour_loss(anchors, embeddings["p"], temperature=self.temperature, group=group)
        return {
            "loss": loss,
            "positive_similarity": positive,
            "negative_similarity": negative,
            **state,
            **masked_means({"contrastive_accuracy": (hits, torch.ones_like(hits))} | found, group),
        }

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        self.prototypes.update(embeddings["z"][0], class_labels(batch), group)

    @torch.no_grad()
    def _nearest_centres(
        self, z: Tensor, batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """The centre nearest to each z [2, N, D], as [2, N, D]; and what to log: of the centres, and of each row."""
        if not self.prototypes.is_ready:
            return z, {}, {}
        rows, labels = z.flatten(0, 1), class_labels(batch).repeat(2)
        ids = self.prototypes.assign(rows)
        centres = self.prototypes.centres[ids]
        cosines = torch.cosine_similarity(centres, rows.to(centres.dtype), dim=1)
        state = {"occupancy": self.prototypes.occupancy(), "assignment_entropy": self.prototypes.entropy(ids, group)}
        return (
            centres.view_as(z),
            state,
            {
                "neighbour_similarity": (cosines, torch.ones_like(ids, dtype=torch.bool)),
                "neighbour_same_class": self.prototypes.same_class(ids, labels),
            },
        )
