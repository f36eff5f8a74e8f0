"""SimCLR (Chen et al., arXiv:2002.05709): two views of an image attract, all other views of the batch repel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from kernels import ntxent
from kernels.ranks import mean_over_ranks
from pipelines.batch import ViewBatch
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector, embed_views
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.parts.pair_softmax import pair_softmax
from trainers.similarity import view_similarities


class Config(MethodConfig):
    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.1, gt=0)
    # cosine is SimCLR; the others compare (`trainers.parts.pair_softmax`), and cost about three times as much.
    similarity: Literal["cosine", "gaussian", "sne", "student_t", "student_t_l1"] = "cosine"
    projector: ProjectorConfig = ProjectorConfig()


class Method(BaseMethod):
    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.temperature, self.similarity = config.temperature, config.similarity
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D]; one forward, so BatchNorm sees both views."""
        return embed_views(self.encoder, self.projector, views)

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        z1, z2 = embeddings["z"].unbind(0)
        if self.similarity == "cosine":
            loss, hits = ntxent(z1, z2, temperature=self.temperature, group=group, return_hits=True)
        else:
            loss, hits = pair_softmax(z1, z2, similarity=self.similarity, temperature=self.temperature, group=group)
        with torch.no_grad():
            positive, negative = view_similarities(z1, z2, group)
        return {
            "loss": loss,
            "contrastive_accuracy": mean_over_ranks(hits.float().mean(), group),
            "positive_similarity": positive,
            "negative_similarity": negative,
        }
