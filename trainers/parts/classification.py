"""Losses of classifiers over several ranks, and where not every image has a label."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.ranks import mean_over_ranks


def labelled_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over all labelled rows (labels [N] from 0) of all ranks, however unevenly they are spread; 0 if none is.

    Its gradient is multiplied by the number of ranks, so that averaging over them is exact.
    """
    share = mean_over_ranks((labels >= 0).to(logits.dtype).sum(), group)  # labelled rows of a rank, on average
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return mean_over_ranks(total / torch.where(share > 0, share, 1), group)


def divergence(logits: Tensor, taught: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """T² KL(softmax(taught / T) || softmax(logits / T)), the mean over rows [N, C] of all ranks (arXiv:1503.02531).

    Its gradient is multiplied by the number of ranks, so that averaging over them is exact.
    """
    ours, theirs = (F.log_softmax(rows / temperature, dim=1) for rows in (logits, taught))
    return temperature**2 * mean_over_ranks(F.kl_div(ours, theirs, reduction="batchmean", log_target=True), group)


def labelled_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of this rank's labelled rows that logits [N, C] classify rightly; 0 if there are none."""
    known = labels >= 0
    return ((logits.argmax(1) == labels) & known).sum() / known.sum().clamp_min(1)
