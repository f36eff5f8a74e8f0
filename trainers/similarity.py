"""How alike positives and negatives are: two scalars that show collapse before accuracy does."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def view_similarities(z1: Tensor, z2: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Mean cosine of the N positive pairs and of all other pairs of the 2N embeddings [N, D], over all ranks.

    The second needs no matrix: the sum over all ordered pairs of <a, b> is |Σ a|², from which the 2N
    self-similarities (1 each) and the 2N ordered positives are taken away.
    """
    unit = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    n = unit.new_full((1,), len(z1))  # filled on the device: a number copied there would be waited for
    sums = torch.cat([unit.sum((0, 1)), (unit[0] * unit[1]).sum().view(1), n])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, positives, n = sums[:-2], sums[-2], sums[-1]
    rows = 2 * n
    others = (total.square().sum() - rows - 2 * positives) / (rows * (rows - 2)).clamp_min(1)
    return positives / n, others
