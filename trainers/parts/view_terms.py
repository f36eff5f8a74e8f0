"""What MV-MR and its CLIP distillation share (arXiv:2303.12130): an image and its view attract, without negatives."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import distance_correlation
from kernels.ranks import mean_over_ranks
from pipelines.config import Section
from trainers.parts.deviations import batch_deviations
from trainers.parts.floored_correlation import floored_distance_correlation

Estimator = Literal["unbiased", "biased", "floored"]


class ViewWeights(Section):
    mse: float = Field(1.0, ge=0)
    std: float = Field(1.0, ge=0)
    views: float = Field(1.0, ge=0)


def view_terms(
    z: Tensor, weights: ViewWeights, *, std_margin: float, estimator: Estimator, group: dist.ProcessGroup | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """mse |z0 - z1|²/D + std Σ_v mean_j relu(margin - std_j) + views (1 - R(z0, z1)), over all ranks.

    z: [2, N, D], of the image and of its view, float32 or float64. Returns the loss, its gradient multiplied by the
    number of ranks, and its terms by name, detached.
    """
    plain, augmented = z.unbind(0)
    deviations = batch_deviations(z, group)
    mse = mean_over_ranks(F.mse_loss(plain, augmented), group)
    hinge = F.relu(std_margin - deviations).mean(1).sum()
    of_views = dependence(plain, augmented, estimator, group)
    loss = weights.mse * mse + weights.std * hinge + weights.views * (1 - of_views)
    terms = {"mse": mse, "std_hinge": hinge, "embedding_std": deviations.mean(), "dependence_views": of_views}
    return loss, {name: value.detach() for name, value in terms.items()}


def dependence(
    x: Tensor, z: Tensor, estimator: Estimator, group: dist.ProcessGroup | None, *, scaled: bool = True
) -> Tensor:
    """R or R*² of embeddings z [N, D] and x [N, p], over all ranks.

    ``floored`` is what the published code computes, which ``scaled`` tells whether it divides x by 32 as it does z.
    """
    if estimator == "floored":
        return floored_distance_correlation(x, z, group, scale_x=scaled)
    return distance_correlation(x, z, unbiased=estimator == "unbiased", group=group)


def as_computed(values: Tensor) -> Tensor:
    """In float32, or float64 as it is: what autocast leaves in 16 bits is no ground for distances."""
    return values if values.element_size() == 8 else values.float()
