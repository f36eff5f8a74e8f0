"""The search of a bank in tiles of PyTorch, for the CPU (and for float64 anywhere).

A tile of scores is computed into one buffer that stays in the cache, looked at, and forgotten. Hardly any row finds a
better match in a tile once a few have been seen (one in t in the t-th), so one maximum a row, which costs next to
nothing, says which rows are worth a closer look. That is also when excluded ids are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 22  # scores alive at a time: 16 MB in float32. Tall tiles: threads meet at the end of each
TILE_ROWS = 8192
TILE_COLUMNS = 1024

Exclude = tuple[Tensor, Tensor] | None


def best_one(
    queries: Tensor, bank: Tensor, *, bias: Tensor | None = None, exclude: Exclude = None
) -> tuple[Tensor, Tensor]:
    """The largest <query, bank row> + bias of each query: scores [M] and indices [M], -inf and -1 where all is barred.

    Args:
        bias: [L], in the dtype of the computation.
    """
    best = queries.new_full((len(queries),), -torch.inf, dtype=_computed(queries, bank))
    places = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    for block, left, tile in _tiles(queries, bank, _widths(len(queries), len(bank), TILE_COLUMNS), bias):
        if left == 0 and exclude is None:
            scores, columns = _first_maximum(tile)
            if not bool(scores.isnan().any()):
                found = scores > -torch.inf
                best[block], places[block] = scores, torch.where(found, columns, -1)
                continue
        rows = _rows_with_more(tile, best[block])
        candidates = _candidates(tile, rows, block, left, exclude)
        scores, columns = _first_maximum(candidates)
        rows += block.start
        better = scores > best[rows]
        best[rows] = torch.where(better, scores, best[rows])
        places[rows] = torch.where(better, columns + left, places[rows])
    return best, places


def best_k(queries: Tensor, bank: Tensor, k: int, exclude: Exclude = None) -> tuple[Tensor, Tensor]:
    """The k largest <query, bank row> of each query, best first: scores [M, k] and indices [M, k]."""
    best = queries.new_full((len(queries), k), -torch.inf, dtype=_computed(queries, bank))
    places = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for block, left, tile in _tiles(queries, bank, _growing_widths(k, len(bank))):
        threshold = best[block, -1]
        rows = _rows_with_more(tile, threshold)
        candidates = _candidates(tile, rows, block, left, exclude)
        # What beats the k-th best so far, moved to the left of each row, in the order of the bank. All of it has
        # a higher index than what was kept, so a stable sort of both puts equal scores in the order of the bank.
        row, column = _where(candidates > threshold[rows, None])
        counts = torch.bincount(row, minlength=len(rows))
        width = int(counts.max()) if len(rows) else 0
        if width == 0:
            continue
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        scores = candidates.new_full((len(rows), k + width), -torch.inf)
        indices = places.new_full((len(rows), k + width), -1)
        rows += block.start
        scores[:, :k], indices[:, :k] = best[rows], places[rows]
        scores[row, k + slot] = candidates[row, column]
        indices[row, k + slot] = column + left
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        best[rows], places[rows] = scores[:, :k], indices.gather(1, order[:, :k])
    return best, places


def _computed(queries: Tensor, bank: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)


def _widths(rows: int, columns: int, width: int) -> Iterator[tuple[int, int]]:
    width = max(width, TILE_ELEMENTS // (4 * max(rows, 128)))  # a few queries: fewer, wider tiles
    for left in range(0, columns, width):
        yield left, min(left + width, columns)


def _growing_widths(k: int, columns: int) -> Iterator[tuple[int, int]]:
    """Narrow tiles first: they tell what a candidate must beat before the wide ones come."""
    left, width, widest = 0, max(2 * k, 128), max(16 * k, 2 * TILE_COLUMNS)
    while left < columns:
        yield left, min(left + width, columns)
        left += width
        width = min(left, widest)


def _tiles(
    queries: Tensor, bank: Tensor, widths: Iterator[tuple[int, int]], bias: Tensor | None = None
) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the queries, first column, scores) of each tile. The scores are overwritten by the next."""
    dtype = _computed(queries, bank)
    queries = queries.to(dtype)
    buffer = queries.new_empty(0)
    for left, right in widths:
        columns = bank[left:right].to(dtype).T
        height = max(1, min(TILE_ROWS, TILE_ELEMENTS // (right - left)))
        for top in range(0, len(queries), height):
            block = slice(top, min(top + height, len(queries)))
            size = (block.stop - top) * (right - left)
            if buffer.numel() < size:
                buffer = queries.new_empty(size)
            tile = buffer[:size].view(-1, right - left)
            if bias is None:
                torch.mm(queries[block], columns, out=tile)
            else:
                torch.addmm(bias[left:right], queries[block], columns, out=tile)
            yield block, left, tile


def _rows_with_more(tile: Tensor, threshold: Tensor) -> Tensor:
    """Rows of the tile whose maximum is above `threshold` [rows]. NaN in the tile becomes -inf."""
    largest = tile.amax(1)
    if bool(largest.isnan().any()):
        largest = tile.masked_fill_(tile.isnan(), -torch.inf).amax(1)
    return (largest > threshold).nonzero().squeeze(1)


def _candidates(tile: Tensor, rows: Tensor, block: slice, left: int, exclude: Exclude) -> Tensor:
    if len(rows) < len(tile):
        tile = tile[rows]
    if exclude is not None:
        query_ids, bank_ids = exclude[0][block][rows], exclude[1][left : left + tile.shape[1]]
        tile.masked_fill_(query_ids[:, None] == bank_ids[None, :], -torch.inf)
    return tile


def _first_maximum(tile: Tensor) -> tuple[Tensor, Tensor]:
    if tile.device.type != "cpu" or len(tile) == 0:
        scores, columns = tile.max(1)
        return scores, columns
    columns = torch.from_numpy(tile.numpy().argmax(1))  # six times as fast as torch's
    return tile.gather(1, columns[:, None]).squeeze(1), columns


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each True, in the order of the rows."""
    if mask.device.type != "cpu":
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    flat = torch.from_numpy(mask.numpy().ravel().nonzero()[0])  # many times as fast as torch's where few are
    return flat // mask.shape[1], flat % mask.shape[1]
