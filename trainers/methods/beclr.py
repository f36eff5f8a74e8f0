"""BeCLR (Rezaei et al., arXiv:2109.07455): SimCLR, and beside it a contrast of learned Bregman divergences.

K subnetworks score each projection, and the one that scores highest is its winner: views attract if they share one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from kernels import bregman_loss, ntxent
from kernels.ranks import mean_over_ranks
from pipelines.batch import ViewBatch
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.subnetworks import Subnetworks, SubnetworksConfig
from trainers.parts.winners import margin_loss, usage_divergence, winner_statistics
from trainers.similarity import view_similarities


class Projector(ProjectorConfig):
    batchnorm: Literal["all", "hidden", "none"] = "hidden"


class Config(MethodConfig):
    """Fields left at ``None`` take the value in the comment."""

    name: Literal["beclr"] = "beclr"
    loss: Literal["contrastive", "margin"] = "contrastive"  # of divergences; margin: D(positive), one negative a view
    temperature: float = Field(0.5, gt=0)  # NT-Xent
    bregman_temperature: float | None = Field(None, gt=0)  # 0.1; faithful: as temperature, with which it hardly learns
    sigma: float = Field(0.9, gt=0)  # width of the similarity exp(-D / 2σ²)
    margin: float = Field(1.0, gt=0)  # of loss=margin
    bregman_weight: float = Field(1.0, gt=0)
    ntxent_weight: float = Field(1.0, ge=0)
    # Winners are softmax(scores / t), t falling from one temperature to the other over this share of a run, then hard.
    soft_share: float | None = Field(None, ge=0, le=1)  # 0.3; faithful: 0
    soft_temperatures: tuple[float, float] = (0.1, 0.01)
    usage_weight: float | None = Field(None, ge=0)  # of KL(uniform || usage); 0.1; faithful: 0
    usage_temperature: float = Field(0.1, gt=0)  # of the softmax that tells which subnetworks are used
    # The seed's: one temperature for both losses, hard winners from the first step, no regulariser, and a margin loss
    # that is half the sum over the views, not their mean.
    faithful: bool = False
    projector: Projector = Projector()
    subnetworks: SubnetworksConfig = SubnetworksConfig()

    def check(self, *, images: int, batch_size: int, image_size: int) -> None:
        super().check(images=images, batch_size=batch_size, image_size=image_size)
        first, last = self.soft_temperatures
        if not first >= last > 0:
            raise ValueError(
                f"method.soft_temperatures={[first, last]}: expected a start and an end with start >= end > 0"
            )

    def settled(self) -> Any:
        """This config without ``None``."""
        theirs = {"bregman_temperature": self.temperature, "soft_share": 0.0, "usage_weight": 0.0}
        ours = {"bregman_temperature": 0.1, "soft_share": 0.3, "usage_weight": 0.1}
        defaults = theirs if self.faithful else ours
        return self.model_copy(update={key: defaults[key] for key in defaults if getattr(self, key) is None})


class Method(BaseMethod):
    steps: Tensor  # [] int64, optimizer steps done

    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.config = config.settled()
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))
        self.subnetworks = Subnetworks(config.projector.output, config.subnetworks)
        self.batch_size, self.seed = facts.batch_size, facts.seed
        self.soft_steps = round(self.config.soft_share * facts.total_steps)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps = 0  # the same on the host, so that no step has to ask the device

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D], scores [2, N, K]."""
        features = self.encoder(views.flatten(0, 1))
        z = self.projector(features)
        parts = {"features": features, "z": z, "scores": self.subnetworks(z)}
        return {name: part.unflatten(0, views.shape[:2]) for name, part in parts.items()}

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        config = self.config
        z1, z2 = embeddings["z"].unbind(0)
        scores1, scores2 = embeddings["scores"].unbind(0)
        divergences = self._loss_of_divergences(scores1, scores2, group)
        loss = config.bregman_weight * divergences
        scalars = {"bregman_loss": divergences.detach()}
        if config.usage_weight:
            usage = usage_divergence(torch.cat([scores1, scores2]), config.usage_temperature, group)
            loss = loss + config.usage_weight * usage
            scalars["usage_divergence"] = usage.detach()
        if config.ntxent_weight:
            contrast, hits = ntxent(z1, z2, temperature=config.temperature, group=group, return_hits=True)
            loss = loss + config.ntxent_weight * contrast
            scalars |= {
                "ntxent_loss": contrast.detach(),
                "contrastive_accuracy": mean_over_ranks(hits.float().mean(), group),
            }
        with torch.no_grad():
            positive, negative = view_similarities(z1, z2, group)
        similarities = {"positive_similarity": positive, "negative_similarity": negative}
        return {"loss": loss} | scalars | similarities | winner_statistics(scores1, scores2, group)

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        self.steps.add_(1)
        self._steps += 1

    @property
    def soft_temperature(self) -> float:
        """Of the soft winners of this step; 0: they are hard."""
        if self._steps >= self.soft_steps:
            return 0.0
        first, last = self.config.soft_temperatures
        return first * (last / first) ** (self._steps / self.soft_steps)

    def _loss_of_divergences(self, scores1: Tensor, scores2: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        config, t, weights = self.config, self.soft_temperature, None
        if t:
            weights = ((scores1 / t).softmax(1), (scores2 / t).softmax(1))
        if config.loss == "contrastive":
            return bregman_loss(
                scores1,
                scores2,
                sigma=config.sigma,
                temperature=config.bregman_temperature,
                weights=weights,
                group=group,
            )
        loss = margin_loss(
            scores1, scores2, self._steps, seed=self.seed, margin=config.margin, weights=weights, group=group
        )
        return loss * self.batch_size if config.faithful else loss

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = int(self.steps)
