"""NT-Xent with another similarity than the cosine, in tiles of rows that are made again for the gradient.

For comparing similarities, as github.com/d-neo/simclr does; `kernels.ntxent` is what is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ntxent_tiled import HIT_SLACK
from kernels.ranks import check_same_on_ranks, gather_rows_with_gradient, group_or_none, mean_over_ranks

_TILE_ROWS = 512


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (2 - 2 * a @ b.T).clamp_min(0)  # of unit rows


def _gaussian(a: Tensor, b: Tensor) -> Tensor:
    squared = _squared_distance(a, b)
    same = squared == 0  # where the square root has no slope
    return torch.exp(-torch.where(same, 1, squared).sqrt().masked_fill(same, 0) / 2)


def _sne(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-_squared_distance(a, b))


def _student_t(a: Tensor, b: Tensor) -> Tensor:
    return 1 / (1 + _squared_distance(a, b))


def _student_t_l1(a: Tensor, b: Tensor) -> Tensor:
    return 1 / (1 + torch.cdist(a, b, p=1))


# Unit rows [m, D] and [n, D] -> similarities [m, n], 1 for equal rows. With d = a - b: exp(-|d|/2), exp(-|d|²),
# 1/(1 + |d|²), 1/(1 + |d|₁).
SIMILARITIES: MappingProxyType[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"gaussian": _gaussian, "sne": _sne, "student_t": _student_t, "student_t_l1": _student_t_l1}
)


def pair_softmax(
    z1: Tensor, z2: Tensor, *, similarity: str, temperature: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """NT-Xent (arXiv:2002.05709, equation 1) with logits similarity / temperature.

    Args:
        z1, z2: [N, D], two views; normalised inside. Row i of one and row i of the other are each other's positive.
        similarity: a key of SIMILARITIES.
        group: as for `kernels.ntxent`: every rank returns the global mean, its gradient is already times W.

    Returns:
        The loss, a scalar (float64 for float64 inputs, else float32), and hits [2N] bool: whose positive is more
        similar than every negative, first view first.
    """
    group = group_or_none(group)
    if group is not None:
        check_same_on_ranks(z1, group)
    with torch.autocast(z1.device.type, enabled=False):
        dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
        views = [F.normalize(z.to(dtype), dim=1) for z in (z1, z2)]
        all_views = views if group is None else [gather_rows_with_gradient(view, group) for view in views]
        anchors, candidates = torch.cat(views), torch.cat(all_views)
        n, total = len(z1), len(all_views[0])
        first = 0 if group is None else dist.get_rank(group) * n
        here = torch.arange(first, first + n, device=z1.device)
        own, partner = torch.cat([here, here + total]), torch.cat([here + total, here])
        tiles = zip(*(rows.split(_TILE_ROWS) for rows in (anchors, own, partner)), strict=True)
        results = [
            checkpoint(_tile, rows, candidates, self_, positive, similarity, temperature, use_reentrant=False)
            for rows, self_, positive in tiles
        ]
        losses, hits = (torch.cat(parts) for parts in zip(*results, strict=True))
        return mean_over_ranks(losses.mean(), group), hits


def _tile(
    rows: Tensor, candidates: Tensor, own: Tensor, positive: Tensor, similarity: str, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = SIMILARITIES[similarity](rows, candidates) / temperature
    logits = logits.scatter(1, own[:, None], -math.inf)
    with torch.no_grad():
        of_positive = logits.gather(1, positive[:, None])[:, 0]
        others = logits.scatter(1, positive[:, None], -math.inf).amax(1)
        hits = of_positive - HIT_SLACK[logits.dtype] * of_positive.abs() > others
    return F.cross_entropy(logits, positive, reduction="none"), hits
