"""The k nearest rows of a bank on a GPU, without the scores.

A first kernel keeps the maximum of each group of 32 bank rows. The k best rows lie in the k best groups (each group
ahead of a row's own has a row ahead of it), so only those are scored again, and one selection among k x 32 keys a
query is left. A key holds the score in its upper half and the index, counted down, in its lower: all differ, so any
selection gives the same result, and of equal scores the lowest index.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.nearest import (
    CONFIGS,
    exclude_ids,
    fits,
    load_rows,
    prepared,
    search_case,
    shares_of_bank,
    tile_scores,
)
from kernels.fused.tuning import CompileCase, bucket, tuned

GROUP = 32  # bank rows that share one maximum
KEYS_ALIVE = 1 << 24  # of groups and of candidates at a time, 8 bytes each
COUNTED_DOWN = 0x7FFFFFFF  # a key's lower half is this minus the index


@triton.jit
def _key(score, index):
    """int64 that orders by score, then by lowest index. NaN counts as -inf, -0 as 0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@tuned(CONFIGS, key=["BLOCK_D", "m_bucket", "l_bucket"], fits=fits)
@triton.jit(do_not_specialize=["m_bucket", "l_bucket"])
def _group_maxima(
    queries, bank, query_ids, bank_ids, keys,
    m, length, groups, width, query_stride, bank_stride, share, m_bucket, l_bucket,
    BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    EXCLUDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys [M, groups] of the largest score in each group of the bank."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, m - 1)
    query_rows = queries + inside.to(tl.int64) * query_stride
    resident = load_rows(query_rows, tl.arange(0, BLOCK_D), width, EVEN, WIDE) if RESIDENT else 0
    query_id = tl.load(query_ids + inside) if EXCLUDE else 0
    in_groups = tl.arange(0, BLOCK_N // GROUP)
    first = tl.program_id(1) * share
    for left in range(first, tl.minimum(first + share, length), BLOCK_N):
        column = tl.minimum(left + tl.arange(0, BLOCK_N), length - 1)
        scores = tile_scores(
            query_rows, resident, bank, bank_stride, column, bank, bank, query_id, bank_ids, width,
            BLOCK_D, RESIDENT, EVEN, WIDE, PRECISION, False, False, EXCLUDE,
        )  # fmt: skip
        highest = tl.max(tl.reshape(scores, (BLOCK_M, BLOCK_N // GROUP, GROUP)), axis=2)
        group = left // GROUP + in_groups
        at = row.to(tl.int64)[:, None] * groups + group[None, :]
        key = _key(highest, tl.broadcast_to(group[None, :], (BLOCK_M, BLOCK_N // GROUP)))
        tl.store(keys + at, key, mask=(row[:, None] < m) & (group[None, :] < groups))


@triton.jit
def _score_again(
    queries, bank, query_ids, bank_ids, group_keys, keys,
    length, width, chosen, query_stride, bank_stride,
    BLOCK_D: tl.constexpr, EXCLUDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Keys [M, chosen x GROUP] of the rows in a query's chosen groups."""
    row, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = 0x7FFFFFFF - (tl.load(group_keys + row * chosen + slot) & 0x7FFFFFFF).to(tl.int32)
    index = group * GROUP + tl.arange(0, GROUP)
    column = tl.minimum(index, length - 1)
    score = tl.zeros((GROUP,), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(queries + row * query_stride + d, mask=d < width, other=0.0).to(tl.float32)
        at = column.to(tl.int64)[:, None] * bank_stride + d[None, :]
        b = tl.load(bank + at, mask=d[None, :] < width, other=0.0).to(tl.float32)
        score += tl.sum(q[None, :] * b, axis=1)
    if EXCLUDE:
        score = tl.where(tl.load(bank_ids + column) == tl.load(query_ids + row), float("-inf"), score)
    score = tl.where(index < length, score, float("-inf"))
    tl.store(keys + (row * chosen + slot) * GROUP + tl.arange(0, GROUP), _key(score, index))


def fused_best_k(
    queries: Tensor, bank: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest <query, bank row> of each query [M, D]: scores [M, k] float32 and indices [M, k] int64."""
    queries, bank, shape = prepared(queries, bank)
    groups = triton.cdiv(len(bank), GROUP)
    chosen = min(k, groups)
    query_ids, bank_ids = exclude_ids(exclude, queries)
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    rows = max(1, KEYS_ALIVE // max(groups, chosen * GROUP))
    with torch.cuda.device_of(queries):
        for top in range(0, len(queries), rows):
            block = queries[top : top + rows]
            ids = query_ids[top : top + rows] if exclude is not None else query_ids
            keys = _keys(block, bank, ids, bank_ids, groups, chosen, exclude is not None, shape)
            best = keys.topk(k, dim=1).values
            bits = (best >> 32).to(torch.int32)
            bits ^= (bits >> 31) & 0x7FFFFFFF
            score = bits.view(torch.float32)
            scores[top : top + rows] = score
            indices[top : top + rows] = torch.where(score == -torch.inf, -1, COUNTED_DOWN - (best & 0x7FFFFFFF))
    return scores, indices


def _keys(
    queries: Tensor, bank: Tensor, query_ids: Tensor, bank_ids: Tensor, groups: int, chosen: int, exclude: bool,
    shape: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Keys [M, chosen x GROUP] of the best groups' rows."""
    m, length, width = len(queries), len(bank), queries.shape[1]
    share, shares = shares_of_bank(m, length, queries.device)
    group_keys = torch.empty(m, groups, dtype=torch.int64, device=queries.device)
    _group_maxima[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), shares)](
        queries, bank, query_ids, bank_ids, group_keys, m, length, groups, width, queries.stride(0), bank.stride(0),
        share, bucket(m), bucket(length), EXCLUDE=exclude, GROUP=GROUP, **shape,
    )  # fmt: skip
    best_groups = group_keys.topk(chosen, dim=1).values
    keys = torch.empty(m, chosen * GROUP, dtype=torch.int64, device=queries.device)
    _score_again[(m, chosen)](
        queries, bank, query_ids, bank_ids, best_groups, keys, length, width, chosen, queries.stride(0), bank.stride(0),
        BLOCK_D=min(triton.next_power_of_2(width), 256), EXCLUDE=exclude, GROUP=GROUP,
    )  # fmt: skip
    return keys


def compile_cases() -> list[CompileCase]:
    more = {"GROUP": GROUP, "EXCLUDE": True}
    return [
        search_case(_group_maxima, "nearest k>1, D=256, bf16, exclude", "*bf16", "*bf16", 256, CONFIGS[1:3], more),
        search_case(_score_again, "candidates of nearest, D=256, bf16", "*bf16", "*bf16", 256, None, more),
    ]
