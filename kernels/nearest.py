"""Exact search of a bank by inner product, in tiles: no [M, L] score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_ELEMENTS = 1 << 22  # scores alive at a time: 16 MB in float32
_BANK_TILE = 4096


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor,
    *,
    k: int = 1,
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``k`` bank rows with the largest inner product with each query, best first.

    Args:
        queries: [M, D], any floating dtype; products are accumulated in float32 (float64 for float64 rows).
        bank: [L, D], on the same device.
        k: how many, 1 <= k <= L.
        exclude: (query_ids [M], bank_ids [L]) integers; a bank row with a query's id never matches it.
        backend: "auto" or "tiled" (this), or "reference" (one matrix product and one sort).

    Returns:
        scores [M, k] and indices [M, k] int64. Where fewer than k rows are allowed, the rest have score -inf.

    Raises:
        ValueError: shapes, k or backend do not fit.
    """
    _check(queries, bank, k, exclude, backend)
    if backend == "reference":
        return _scores(queries, bank, exclude, slice(0, len(queries)), slice(0, len(bank))).topk(k, dim=1)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = torch.empty(len(queries), k, dtype=dtype, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    bank_tile = max(_BANK_TILE, k)
    rows = max(1, _TILE_ELEMENTS // min(bank_tile, len(bank)))
    for top in range(0, len(queries), rows):
        block = slice(top, min(top + rows, len(queries)))
        best: tuple[Tensor, Tensor] | None = None
        for left in range(0, len(bank), bank_tile):
            columns = slice(left, min(left + bank_tile, len(bank)))
            tile = _scores(queries, bank, exclude, block, columns)
            values, places = tile.topk(min(k, tile.shape[1]), dim=1)
            places += left
            if best is not None:
                values, places = torch.cat([best[0], values], 1), torch.cat([best[1], places], 1)
                values, order = values.topk(min(k, values.shape[1]), dim=1)
                places = places.gather(1, order)
            best = (values, places)
        assert best is not None
        scores[block], indices[block] = best
    return scores, indices


def _scores(
    queries: Tensor, bank: Tensor, exclude: tuple[Tensor, Tensor] | None, rows: slice, columns: slice
) -> Tensor:
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = queries[rows].to(dtype) @ bank[columns].to(dtype).T
    if exclude is not None:
        scores.masked_fill_(exclude[0][rows, None] == exclude[1][None, columns], float("-inf"))
    return scores


def _check(queries: Tensor, bank: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None, backend: str) -> None:
    if queries.dim() != 2 or bank.dim() != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries [M, D] and bank [L, D] must share D, got {list(queries.shape)} and {list(bank.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} must lie between 1 and the bank's {len(bank)} rows")
    if exclude is not None and (len(exclude[0]) != len(queries) or len(exclude[1]) != len(bank)):
        raise ValueError(
            f"exclude must be (query_ids [{len(queries)}], bank_ids [{len(bank)}]), got lengths"
            f" {len(exclude[0])} and {len(exclude[1])}"
        )
    if backend not in ("auto", "tiled", "reference"):
        raise ValueError(f"backend={backend!r} is not known; choose auto, tiled or reference")
