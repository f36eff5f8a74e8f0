"""What is trained, and by which loss."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.speedrun.recipe import Recipe
from kernels.contrastive import contrastive_loss
from kernels.ntxent import ntxent


class Network(nn.Module):
    """Encoder and projector; forward: views [2N, 3, S, S] -> projections [2N, D]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, width = make_encoder(recipe.arch)
        self.projector = nn.Sequential(
            nn.Linear(width, recipe.hidden, bias=False),
            nn.BatchNorm1d(recipe.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(recipe.hidden, recipe.output, bias=False),
            nn.BatchNorm1d(recipe.output),
        )

    def forward(self, views: Tensor) -> Tensor:
        projections: Tensor = self.projector(self.encoder(views))
        return projections


def make_encoder(arch: str) -> tuple[Any, int]:
    """An encoder with the stem for small images, and its width.

    The ResNet-18 is that of `trainers.encoders`, which needs pydantic; a machine with a GPU may have none.
    """
    if arch != "resnet18":
        from trainers.encoders import EncoderConfig, build_encoder, feature_width

        encoder = build_encoder(EncoderConfig(arch=cast(Any, arch), stem="small"), 32)
        return encoder, feature_width(encoder)
    encoder = torchvision.models.resnet18(weights=None)
    width = encoder.fc.in_features
    encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.maxpool, encoder.fc = nn.Identity(), nn.Identity()
    return encoder, width


def batch_loss(projections: Tensor, recipe: Recipe) -> Tensor:
    """Mean loss of projections [2N, D], first all first views, then all second ones."""
    if not recipe.fused_loss:
        return _by_matrix(projections, recipe)
    first, second = projections.chunk(2)
    if recipe.loss == "ntxent":
        loss: Tensor = ntxent(first, second, temperature=recipe.temperature)
        return loss
    rows = F.normalize(projections.float())
    own = torch.arange(len(rows), device=rows.device)
    losses = contrastive_loss(rows, rows, own.roll(len(first)), temperature=recipe.temperature, exclude=own)
    return decoupled(losses).mean()


def decoupled(losses: Tensor) -> Tensor:
    """The loss without the positive in the denominator, from the one with it.

    With p the positive's logit and n the log-sum of the negatives', the usual loss is L = log(1 + exp(n - p)), the
    decoupled one is n - p = log(exp(L) - 1).
    """
    losses = losses.clamp_min(1e-6)  # the slope grows as 1/L
    return losses + torch.log(-torch.expm1(-losses))


def _by_matrix(projections: Tensor, recipe: Recipe) -> Tensor:
    rows = F.normalize(projections.float())
    logits = rows @ rows.T / recipe.temperature
    own = torch.arange(len(rows), device=rows.device)
    positive = own.roll(len(rows) // 2)
    logits = logits.masked_fill(own == own[:, None], -math.inf)
    if recipe.loss == "ntxent":
        return F.cross_entropy(logits, positive)
    pulled = logits.gather(1, positive[:, None])[:, 0]
    return (logits.masked_fill(own == positive[:, None], -math.inf).logsumexp(1) - pulled).mean()
