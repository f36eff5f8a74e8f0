"""The parts of the distance correlation in PyTorch, in float64, without an array of n x n: for large batches.

Distances are made tile by tile, used, and made again in the backward pass, half of them, since they are symmetric. For
|x_i - x_j| = a_ij, and as well for the b_ij of y, one visit gives the sums of a b, a a and b b and those of each row,
from which the centred sums follow. Both centrings take out whatever is common to all distances: taken out beforehand,
it leaves no large numbers to be subtracted from each other. See `kernels.distance` for the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Few tiles of float64, 512 KB each, are alive at a time: they stay near the core.
TILE = 256
_BLOCK_ELEMENTS = 1 << 19  # of a tile's rows in float64 at a time: 4 MB


class Side(NamedTuple):
    """What is kept of x or y."""

    rows: Tensor | None  # [n, p] where a gradient is wanted
    features: Tensor  # [n, p]
    mean: Tensor  # [p] float64
    norms: Tensor  # [n] float64, squared, of the centred rows
    common: Tensor  # [] float64, what is taken out of all distances
    sums: Tensor  # [n] float64, of each row of distances; `moments` fills them in


def distances(rows: Tensor, group: dist.ProcessGroup | None) -> Side:
    """What `moments` and `gradient` need of rows [n, p]; all of them are on this rank."""
    mean, norms = rows.mean(0, dtype=torch.float64), rows.new_empty(len(rows), dtype=torch.float64)
    for some in _parts(len(rows), max(1, _BLOCK_ELEMENTS // rows.shape[1])):
        norms[some] = (rows[some].double() - mean).square_().sum(1)
    return Side(rows, rows, mean, norms, (2 * norms.mean()).sqrt(), torch.zeros_like(norms))


def moments(x: Side, y: Side, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of A B, A A and B B."""
    n, products = len(x.norms), x.norms.new_zeros(3)
    for side in (x, y):
        side.sums.zero_()
    for down, across in _tiles(n):
        pair, times = [], 1 if down == across else 2
        for side in (x, y):
            values = _distances(side, down, across).sub_(side.common)
            if unbiased and down == across:
                values.fill_diagonal_(0)
            side.sums[down] += values.sum(1)
            if down != across:
                side.sums[across] += values.sum(0)
            pair.append(values.flatten())
        a, b = pair
        products += times * torch.stack([a @ b, a @ a, b @ b])
    found = []
    for product, first, second in zip(products, (x, x, y), (y, x, y), strict=True):
        each, of_all = _weights(n, unbiased)
        centred = product - 2 * each * (first.sums @ second.sums) + of_all * first.sums.sum() * second.sums.sum()
        found.append(centred if first is not second else centred.clamp_min(0))
    return found[0], found[1], found[2]


def gradient(own: Side, other: Side, slopes: Tensor, unbiased: bool) -> Tensor:
    """As `kernels.distance_tiled.gradient`."""
    n, width = own.features.shape
    of_rows = torch.zeros(n, width, dtype=torch.float64, device=own.norms.device)
    weights = torch.zeros_like(own.norms)  # what each row is pulled by in all
    step = max(1, _BLOCK_ELEMENTS // TILE)
    for down, across in _tiles(n):
        lengths = _distances(own, down, across)
        apart = lengths == 0
        pull = _centred(_distances(other, down, across), other, down, across, unbiased).mul_(2 * slopes[0])
        pull += _centred(lengths.clone(), own, down, across, unbiased).mul_(4 * slopes[1])
        pull.div_(lengths).masked_fill_(apart, 0)
        weights[down] += pull.sum(1)
        if down != across:
            weights[across] += pull.sum(0)
        for some in _parts(width, step):
            of_rows[down, some] -= pull @ _block(own, across, some)
            if down != across:
                of_rows[across, some] -= pull.T @ _block(own, down, some)
    found = torch.empty_like(own.features, memory_format=torch.contiguous_format)
    for some in _parts(n, max(1, _BLOCK_ELEMENTS // width)):
        found[some] = of_rows[some].addcmul_(weights[some, None], own.features[some].double() - own.mean)
    return found


def _weights(n: int, unbiased: bool) -> tuple[float, float]:
    """What the sum of a row, and that of all, count for in an element of the centred matrix."""
    return (1 / (n - 2), 1 / ((n - 1) * (n - 2))) if unbiased else (1 / n, 1 / n**2)


def _centred(values: Tensor, side: Side, down: slice, across: slice, unbiased: bool) -> Tensor:
    """A tile of distances, centred in place; on the diagonal, where distances are 0, it does not matter."""
    each, of_all = _weights(len(side.sums), unbiased)
    values.sub_(side.common - of_all * side.sums.sum())
    return values.sub_(each * side.sums[down, None]).sub_(each * side.sums[across])


def _distances(side: Side, down: slice, across: slice) -> Tensor:
    """One tile of distances."""
    products = side.norms.new_zeros(down.stop - down.start, across.stop - across.start)
    for some in _parts(len(side.mean), max(1, _BLOCK_ELEMENTS // TILE)):
        products.addmm_(_block(side, down, some), _block(side, across, some).T)
    limits = side.norms[down, None] + side.norms[across]
    squared = products.mul_(-2).add_(limits)
    # What rounding leaves of a distance of 0, or nothing that float32 inputs could tell from it.
    squared.masked_fill_(squared <= limits.mul_(64 * torch.finfo(torch.float64).eps), 0)
    if down == across:
        squared.fill_diagonal_(0)
    return squared.sqrt_()


def _block(side: Side, rows: slice, columns: slice) -> Tensor:
    return side.features[rows, columns].double() - side.mean[columns]


def _tiles(n: int) -> Iterator[tuple[slice, slice]]:
    """Those on and above the diagonal."""
    for down in _parts(n, TILE):
        for left in range(down.start, n, TILE):
            yield down, slice(left, min(left + TILE, n))


def _parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
