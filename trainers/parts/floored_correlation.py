"""Distance correlation as the code published with MV-MR computes it (arXiv:2303.12130)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.ranks import gather_rows_with_gradient

_SCALE = 1 / 32  # of features, for the sake of 16-bit floats
_FLOOR = 1e-4  # of squared distances: no slope below it, and 0.01 is the distance of a row from itself
_LEAST = 1e-12  # of a root's argument, where that code would return NaN


def floored_distance_correlation(
    x: Tensor, y: Tensor, group: dist.ProcessGroup | None = None, *, scale_x: bool = True
) -> Tensor:
    """R of the V-statistics of x / 32 and y / 32, squared distances floored at 1e-4.

    Biased: for independent features of many dimensions it nears 1. With the floor the scale of features matters. For
    runs as they were published; `kernels.distance_correlation` for all others.

    Args:
        x: [n, p] features, float32 or float64; `scale_x`: whether they are divided by 32 as well.
        y: [n, q] features of the same images.
        group: as of `kernels.distance_correlation`; here every rank gathers the features of all.

    Returns:
        Scalar; its gradient is 0 where x or y has collapsed.
    """
    a, b = (_centred(rows, group) for rows in (x * _SCALE if scale_x else x, y * _SCALE))
    cross, own_x, own_y = ((first * second).mean() for first, second in ((a, b), (a, a), (b, b)))
    return cross.clamp_min(_LEAST).sqrt() / (own_x * own_y).clamp_min(_LEAST).pow(0.25)


def _centred(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Doubly centred distances of the rows of all ranks, [W·n, W·n]."""
    if group is not None:
        rows = gather_rows_with_gradient(rows, group)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows - rows.mean(0)  # changes no distance, and loses fewer digits below
        norms = rows.square().sum(1)
        squared = norms[:, None] + norms - 2 * rows @ rows.T
    distances = squared.clamp_min(_FLOOR).sqrt()
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
