"""Probabilistic SimCLR (github.com/sylviesss/pytorch-simclr): a view's projection is a posterior over latent classes.

Views attract as they are likely to share their class; passes with dropout tell what the network does not know.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from kernels import ntxent, simplex_loss
from kernels.ranks import mean_over_ranks
from pipelines.batch import ViewBatch
from trainers.dropout import add_dropout
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector, embed_views
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.posterior import BETA, posterior_statistics
from trainers.similarity import view_similarities


class Config(MethodConfig):
    name: Literal["probsimclr"] = "probsimclr"
    # simplex: log inner products of posteriors, the other view's images as negatives; ntxent: SimCLR's loss.
    loss: Literal["simplex", "ntxent"] = "simplex"
    temperature: float = Field(0.5, gt=0)  # simplex: at 1 the softmax is Bayes-optimal; the seed ran 0.5
    beta: float = Field(BETA, gt=0)  # simplex: sharpness of the softplus
    floor: float = Field(1e-4, gt=0)  # simplex: least N <π, π'>
    # In the projector and after the stem and each stage of the encoder; the seed's: 0.3. Evaluation may keep it on
    # (trainers/posterior.py); the seed's was on always.
    dropout: float = Field(0.0, ge=0, lt=1)
    projector: ProjectorConfig = ProjectorConfig()


class Method(BaseMethod):
    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.config, self.beta = config, config.beta
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))
        if config.dropout > 0:
            add_dropout(encoder, config.dropout)
            add_dropout(self.projector, config.dropout)

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [V, N, 3, H, W] -> features [V, N, d], z [V, N, C]."""
        return embed_views(self.encoder, self.projector, views)

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        config = self.config
        z1, z2 = embeddings["z"].unbind(0)
        if config.loss == "ntxent":
            loss, hits = ntxent(z1, z2, temperature=config.temperature, group=group, return_hits=True)
            scalars = {"contrastive_accuracy": mean_over_ranks(hits.float().mean(), group)}
        else:
            loss = simplex_loss(z1, z2, temperature=config.temperature, beta=self.beta, floor=config.floor, group=group)
            scalars = posterior_statistics(z1, z2, self.beta, group)
        with torch.no_grad():
            positive, negative = view_similarities(z1, z2, group)
        return {"loss": loss, "positive_similarity": positive, "negative_similarity": negative} | scalars
