"""AVGSimCLR (github.com/d-neo/simclr): SimCLR on 2, 4, 6, … views of an image, the loss averaged over their pairs.

``views.repeat`` of the recipe says how many: with a plan of two views, ``repeat: 2`` makes four.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import contrastive_loss, ntxent
from kernels.ranks import check_same_on_ranks, gather_rows_with_gradient, group_or_none, mean_over_ranks
from pipelines.batch import ViewBatch
from pipelines.views import View
from trainers.encoders import feature_width
from trainers.heads import ProjectorConfig, build_projector, embed_views
from trainers.methods import BaseMethod, Facts, MethodConfig
from trainers.similarity import view_similarities


class Config(MethodConfig):
    name: Literal["avgsimclr"] = "avgsimclr"
    temperature: float = Field(0.1, gt=0)
    # pairs: NT-Xent of views (1, 2), (3, 4), …, each pair with its own negatives, as the authors do. all_pairs: of
    # every two views. shared: every other view of an image is a positive, all views of others are negatives (SupCon,
    # arXiv:2004.11362, equation 2, with the image as the class).
    pairing: Literal["pairs", "all_pairs", "shared"] = "pairs"
    projector: ProjectorConfig = ProjectorConfig()

    def check_views(self, plan: tuple[View, ...]) -> None:
        if len(plan) % 2:
            raise ValueError(
                f"the views section makes {len(plan)} views of an image, method.name={self.name} takes an even number:"
                " set views.repeat=2 or more with a plan of two"
            )


class Method(BaseMethod):
    """The encoder sees one pair of views at a time, so memory, and what BatchNorm sees, are those of SimCLR."""

    def __init__(self, config: Config, encoder: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.temperature, self.pairing = config.temperature, config.pairing
        self.view_parts = len(facts.plan) // 2
        self.separable = config.pairing == "pairs"
        self.encoder = encoder
        self.projector = build_projector(config.projector, feature_width(encoder))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D]."""
        return embed_views(self.encoder, self.projector, views)

    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """Of z [V, N, D]; with ``pairing=pairs`` V may be the 2 of one pair."""
        z = embeddings["z"]
        neighbours = list(zip(z[::2], z[1::2], strict=True))
        if self.pairing == "shared":
            loss = _shared_negatives(z, self.temperature, group)
        else:
            pairs = neighbours if self.pairing == "pairs" else list(combinations(z, 2))
            losses = [ntxent(one, other, temperature=self.temperature, group=group) for one, other in pairs]
            loss = torch.stack(losses).mean()
        with torch.no_grad():
            similarities = torch.stack([torch.stack(view_similarities(*pair, group)) for pair in neighbours]).mean(0)
        return {"loss": loss, "positive_similarity": similarities[0], "negative_similarity": similarities[1]}


def _shared_negatives(z: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """Mean over anchors and their positives p of -log softmax_p(cosines / τ) over all other rows of all views.

    z [V, N, D]. Of one positive it is `contrastive_loss`; the mean over V - 1 of them differs from that by their
    cosines alone, for which no matrix is needed.
    """
    group = group_or_none(group)
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=2)
        anchors = candidates = unit.flatten(0, 1)
        first = 0
        if group is not None:
            check_same_on_ranks(anchors, group)
            candidates, first = gather_rows_with_gradient(anchors, group), dist.get_rank(group) * len(anchors)
        own = torch.arange(first, first + len(anchors), device=z.device)
        positive = own.unflatten(0, z.shape[:2]).roll(-1, dims=0).flatten()
        losses = contrastive_loss(anchors, candidates, positive, temperature=temperature, exclude=own)
        with_all = (unit * unit.sum(0)).sum(2)
        with_others = (with_all - unit.square().sum(2)) / (len(z) - 1)
        with_one = (unit * unit.roll(-1, dims=0)).sum(2)
        return mean_over_ranks(losses.mean() + (with_one - with_others).mean() / temperature, group)
