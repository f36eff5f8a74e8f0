"""The parts of the distance correlation in PyTorch, in float64. See `kernels.distance` for the formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20  # of the features in float64 at a time: 8 MB
_ROW_TILES = 4  # inner products are symmetric: of 4 x 4 tiles, 10 are made


class Side(NamedTuple):
    """What is kept of x or y: the rows where a gradient is wanted, their mean [p], distances [n, n]."""

    rows: Tensor | None
    mean: Tensor
    distances: Tensor


def distances(rows: Tensor, group: dist.ProcessGroup | None) -> Side:
    """Distances of rows [n, p], of whose columns each rank of a group holds some."""
    n, columns = rows.shape
    # Distances do not depend on the origin, but what is lost in |x|² + |y|² - 2xy does.
    mean = rows.mean(0, dtype=torch.float64)
    gram = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    step, height = max(1, _BLOCK_ELEMENTS // n), -(-n // _ROW_TILES)
    for left in range(0, columns, step):
        block = rows[:, left : left + step].double() - mean[left : left + step]
        for top in range(0, n, height):
            gram[top : top + height, top:].addmm_(block[top : top + height], block[top:].T)
    gram = gram.triu_().add_(gram.triu(1).T)
    if group is not None:
        dist.all_reduce(gram, group=group)
    norms = gram.diagonal().clone()
    limits = norms[:, None] + norms
    squared = gram.mul_(-2).add_(limits)
    # What rounding leaves of a distance of 0, or nothing that float32 inputs could tell from it.
    limits.mul_(64 * torch.finfo(torch.float64).eps)
    squared.masked_fill_(squared <= limits, 0)
    return Side(rows, mean, squared.sqrt_())


def moments(x: Side, y: Side, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of A B, A A and B B."""
    a, b = centred(x.distances, unbiased), centred(y.distances, unbiased)
    return (a * b).sum(), a.square().sum(), b.square().sum()


def gradient(own: Side, other: Side, slopes: Tensor, unbiased: bool) -> Tensor:
    """The gradient to the rows of `own`, [n, p] in their dtype.

    slopes: [2] float64, the derivatives of the loss to the sum of A B and to that of A A.
    """
    assert own.rows is not None
    a, b = centred(own.distances, unbiased), centred(other.distances, unbiased)
    pull = b.mul_(2 * slopes[0]).add_(a.mul_(4 * slopes[1])).div_(own.distances)
    pull.masked_fill_(own.distances == 0, 0)
    laplacian = pull.neg_()
    laplacian.diagonal().sub_(laplacian.sum(1))
    found = torch.empty_like(own.rows, memory_format=torch.contiguous_format)
    step = max(1, _BLOCK_ELEMENTS // len(found))
    for left in range(0, found.shape[1], step):
        some = slice(left, left + step)
        found[:, some] = laplacian @ (own.rows[:, some].double() - own.mean[some])
    return found


def centred(distances: Tensor, unbiased: bool) -> Tensor:
    """U-centred distances, or doubly centred ones."""
    n = len(distances)
    rows = distances.sum(1)
    if not unbiased:
        return distances - (rows / n)[:, None] - rows / n + rows.sum() / n**2
    of_rows = rows / (n - 2)
    found = distances - of_rows[:, None] - of_rows + rows.sum() / ((n - 1) * (n - 2))
    return found.masked_fill(torch.eye(n, dtype=torch.bool, device=found.device), 0)
