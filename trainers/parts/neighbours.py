"""What NNCLR and KMCLR share: an image's neighbour, found by its projection of one view, must pick out its prediction
of the other view from the predictions of all images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import contrastive_loss
from kernels.ranks import gather_rows_with_gradient, group_or_none, mean_over_ranks
from pipelines.batch import ViewBatch
from trainers.heads import ProjectorConfig


class NeighbourProjector(ProjectorConfig):
    """The projector of NNCLR (arXiv:2104.14548, section 4.1), with BatchNorm after all layers."""

    layers: int = Field(3, ge=1)
    hidden: int | None = Field(2048, ge=1)
    output: int = Field(256, ge=1)


def embed_and_predict(
    encoder: nn.Module, projector: nn.Module, predictor: nn.Module, views: Tensor
) -> dict[str, Tensor]:
    """views [2, N, 3, H, W] -> features [2, N, d], z [2, N, D], p [2, N, D]; BatchNorm sees both views together."""
    features = encoder(views.flatten(0, 1))
    z = projector(features)
    rows = {"features": features, "z": z, "p": predictor(z)}
    return {name: value.unflatten(0, views.shape[:2]) for name, value in rows.items()}


def neighbour_loss(
    anchors: Tensor, predictions: Tensor, *, temperature: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of NNCLR (arXiv:2104.14548, equation 3, and its symmetric form).

    With unit rows a of ``anchors`` and p of ``predictions``, M images over all ranks, and v' the view that is not v:

        L = 1/(2M) Σ_v Σ_i −log [ exp(a_vi·p_v'i / τ) / Σ_j exp(a_vi·p_v'j / τ) ]        j = 1 … M

    Args:
        anchors: [2, N, D], what stands for each projection; normalised here. No gradient flows to them.
        predictions: [2, N, D], normalised here. On each of W ranks as many.
        temperature: τ > 0.
        group: the predictions are those of all its ranks.

    Returns:
        The loss, over all ranks, with the gradient of that mean times W; and [2N] bool, whether an anchor of this rank
        is closer to its prediction than to all others. float64 for float64 predictions, else float32.
    """
    dtype = torch.float64 if predictions.dtype == torch.float64 else torch.float32
    anchors, candidates = (F.normalize(rows.to(dtype), dim=2) for rows in (anchors.detach(), predictions))
    positive = torch.arange(candidates.shape[1], device=candidates.device)
    group = group_or_none(group)
    if group is not None:
        positive += len(positive) * dist.get_rank(group)
        candidates = gather_rows_with_gradient(candidates.transpose(0, 1), group).transpose(0, 1).contiguous()
    rows = [
        contrastive_loss(anchors[v], candidates[1 - v], positive, temperature=temperature, return_hits=True)
        for v in (0, 1)
    ]
    losses, hits = (torch.cat(halves) for halves in zip(*rows, strict=True))
    # The gradient of the local mean is the right one: collected from all ranks it is W times that of the global mean.
    return mean_over_ranks(losses.mean(), group), hits


@torch.no_grad()
def masked_means(
    values: Mapping[str, tuple[Tensor, Tensor]], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """By name, the mean over all ranks of the values [M] whose mask [M] is True (NaN if there is none), in float32."""
    sums = [torch.stack([torch.where(mask, value.float(), 0).sum(), mask.sum()]) for value, mask in values.values()]
    totals = torch.stack(sums)
    if group is not None:
        dist.all_reduce(totals, group=group)
    return dict(zip(values, totals[:, 0] / totals[:, 1], strict=True))


def class_labels(batch: ViewBatch) -> Tensor:
    """[N] int64, the one class of each image; -1 where it is unknown or where images have several."""
    if batch.labels.dim() == 1:
        return batch.labels
    return torch.full_like(batch.indices, -1)
