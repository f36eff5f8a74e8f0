"""How far embeddings spread over the batch of all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from kernels.ranks import mean_over_ranks

VARIANCE_FLOOR = 1e-4  # added under the root, whose slope would be infinite where embeddings have collapsed


def batch_deviations(z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The (unbiased) standard deviation of each dimension over the images of all ranks.

    z: [V, N, D], the N images of this rank; as many on each. The gradient to them is multiplied by the number of
    ranks, so that averaging over ranks is exact.

    Returns: [V, D].
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    mean = mean_over_ranks(z.mean(1), group).detach()  # the gradient through it sums to 0 over the batch
    squares = (z - mean[:, None]).square().sum(1)
    variance = mean_over_ranks(squares, group) * (ranks / (ranks * z.shape[1] - 1))
    return (variance + VARIANCE_FLOOR).sqrt()
