"""The nearest row of a bank on a GPU: the maximum is taken where the scores are computed, in registers.

A program keeps the best score and index of its queries while it walks over its share of the bank; the shares' winners
are merged afterwards. No mask guards the last tile: columns beyond the bank repeat its last row, behind itself, where
they win no tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.products import precision, product
from kernels.fused.tuning import CompileCase, bucket, tuned

SHARE = 256  # a program's share of the bank is a multiple of this, hence of every BLOCK_N


def _config(rows: int, columns: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": columns}, num_warps=warps, num_stages=stages)


CONFIGS = [_config(64, 64, 4, 2), _config(128, 64, 8, 3), _config(128, 128, 8, 2), _config(128, 128, 8, 3)]


def fits(config: triton.Config, arguments: Mapping[str, Any], shared: int) -> bool:
    """Whether the tiles of the queries and of the bank, as many as there are stages, find room."""
    rows, columns, stages = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"], config.num_stages
    is_float32 = arguments["PRECISION"] is not None
    if is_float32 and columns > 64:
        return False  # its parts for the tensor cores take many registers
    tiles = rows + stages * columns if arguments["RESIDENT"] else stages * (rows + columns)
    return tiles * arguments["BLOCK_D"] * (4 if is_float32 else 2) <= shared


@triton.jit
def load_rows(row_starts, d, width, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """[rows, BLOCK_D] of some rows; WIDE: in float32, because the two sides of the product differ in type."""
    if EVEN:
        rows = tl.load(row_starts[:, None] + d[None, :])
    else:
        rows = tl.load(row_starts[:, None] + d[None, :], mask=d[None, :] < width, other=0.0)
    if WIDE:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def tile_scores(
    query_rows, resident, bank, bank_stride, column, scale, bias, query_id, bank_ids, width,
    BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK_M, BLOCK_N] of these columns. RESIDENT: whole queries are at hand, else D goes in chunks."""
    d = tl.arange(0, BLOCK_D)
    bank_rows = bank + column.to(tl.int64) * bank_stride
    if RESIDENT:
        scores = tl.zeros((resident.shape[0], column.shape[0]), tl.float32)
        scores = product(resident, tl.trans(load_rows(bank_rows, d, width, EVEN, WIDE)), scores, PRECISION)
    else:
        scores = tl.zeros((query_rows.shape[0], column.shape[0]), tl.float32)
        for start in range(0, width, BLOCK_D):
            q = load_rows(query_rows, start + d, width, EVEN, WIDE)
            b = load_rows(bank_rows, start + d, width, EVEN, WIDE)
            scores = product(q, tl.trans(b), scores, PRECISION)
    if SCALE:
        scores *= tl.load(scale + column)[None, :]
    if BIAS:
        scores += tl.load(bias + column)[None, :]
    if EXCLUDE:
        scores = tl.where(query_id[:, None] == tl.load(bank_ids + column)[None, :], float("-inf"), scores)
    return scores


@tuned(CONFIGS, key=["BLOCK_D", "m_bucket", "l_bucket"], fits=fits)
@triton.jit(do_not_specialize=["m_bucket", "l_bucket"])
def _best_one(
    queries, bank, scale, bias, query_ids, bank_ids, best_scores, best_indices,
    m, length, width, query_stride, bank_stride, share, m_bucket, l_bucket,
    BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best of one share of the bank, for one block of queries: [shares, M] scores and indices."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, m - 1)
    query_rows = queries + inside.to(tl.int64) * query_stride
    resident = load_rows(query_rows, tl.arange(0, BLOCK_D), width, EVEN, WIDE) if RESIDENT else 0
    query_id = tl.load(query_ids + inside) if EXCLUDE else 0
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    place = tl.full((BLOCK_M,), -1, tl.int32)
    in_tile = tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    for left in range(first, tl.minimum(first + share, length), BLOCK_N):
        column = tl.minimum(left + in_tile, length - 1)
        scores = tile_scores(
            query_rows, resident, bank, bank_stride, column, scale, bias, query_id, bank_ids, width,
            BLOCK_D, RESIDENT, EVEN, WIDE, PRECISION, SCALE, BIAS, EXCLUDE,
        )  # fmt: skip
        highest = tl.max(scores, axis=1)
        position = tl.min(tl.where(scores == highest[:, None], in_tile[None, :], BLOCK_N), axis=1)
        better = highest > best  # an equal score that comes later does not win
        place = tl.where(better, left + position, place)
        best = tl.where(better, highest, best)
    out = row.to(tl.int64) + tl.program_id(1) * m
    tl.store(best_scores + out, best, mask=row < m)
    tl.store(best_indices + out, place, mask=row < m)


@triton.jit
def _merge(share_scores, share_indices, scores, indices, m, shares, BLOCK_M: tl.constexpr):
    """The best of all shares, the first of equals."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    place = tl.full((BLOCK_M,), -1, tl.int32)
    for share in range(shares):
        at = row.to(tl.int64) + share * m
        score = tl.load(share_scores + at, mask=row < m, other=float("-inf"))
        index = tl.load(share_indices + at, mask=row < m, other=-1)
        better = score > best
        place = tl.where(better, index, place)
        best = tl.where(better, score, best)
    tl.store(scores + row, best, mask=row < m)
    tl.store(indices + row, place.to(tl.int64), mask=row < m)


def fused_best_one(
    queries: Tensor,
    bank: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest <query, bank row> · scale + bias of each query [M, D]: scores [M] float32 and indices [M] int64.

    Args:
        scale, bias: [L] float32.
    """
    queries, bank, shape = prepared(queries, bank)
    m, length = len(queries), len(bank)
    share, shares = shares_of_bank(m, length, queries.device)
    share_scores = torch.empty(shares, m, dtype=torch.float32, device=queries.device)
    share_indices = torch.empty(shares, m, dtype=torch.int32, device=queries.device)
    scores = torch.empty(m, dtype=torch.float32, device=queries.device)
    indices = torch.empty(m, dtype=torch.int64, device=queries.device)
    query_ids, bank_ids = exclude_ids(exclude, queries)
    with torch.cuda.device_of(queries):
        _best_one[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), shares)](
            queries, bank, bank if scale is None else scale, bank if bias is None else bias, query_ids, bank_ids,
            share_scores, share_indices, m, length, queries.shape[1], queries.stride(0), bank.stride(0), share,
            bucket(m), bucket(length), SCALE=scale is not None, BIAS=bias is not None, EXCLUDE=exclude is not None,
            **shape,
        )  # fmt: skip
        _merge[(triton.cdiv(m, 128),)](share_scores, share_indices, scores, indices, m, shares, BLOCK_M=128)
    return scores, indices


def prepared(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Both with adjacent columns, and how their tiles are laid out."""
    queries, bank = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (queries, bank))
    wide = torch.promote_types(queries.dtype, bank.dtype)
    width = queries.shape[1]
    block = max(16, triton.next_power_of_2(width))
    resident = wide != torch.float32 and block <= 256
    if not resident:
        block = 128 // wide.itemsize
    return queries, bank, {
        "BLOCK_D": block,
        "RESIDENT": resident,
        "EVEN": width % block == 0,
        "WIDE": queries.dtype != bank.dtype,
        "PRECISION": precision(torch.empty(0, dtype=wide)),
    }  # fmt: skip


def exclude_ids(exclude: tuple[Tensor, Tensor] | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    if exclude is None:
        return unused, unused
    return exclude[0].to(torch.int64).contiguous(), exclude[1].to(torch.int64).contiguous()


def shares_of_bank(m: int, length: int, device: torch.device) -> tuple[int, int]:
    """Bank rows a share, and shares: so many that two programs run on each multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = max(1, 2 * processors // triton.cdiv(m, 128))
    share = triton.cdiv(triton.cdiv(length, wanted), SHARE) * SHARE
    return share, triton.cdiv(length, share)


def nearest_case(
    name: str, queries: str, bank: str, *, block: int, configs: Any = None, **constants: Any
) -> CompileCase:
    """The search for k = 1 with these types of rows."""
    return search_case(_best_one, name, queries, bank, block, configs, {"SCALE": False, "BIAS": False, **constants})


def search_case(
    kernel: Any, name: str, queries: str, bank: str, block: int, configs: Any, constants: dict[str, Any]
) -> CompileCase:
    types = {"queries": queries, "bank": bank, "scale": "*fp32", "bias": "*fp32", "query_ids": "*i64", "chosen": "i32"}
    types |= {"bank_ids": "*i64", "best_scores": "*fp32", "best_indices": "*i32", "keys": "*i64", "group_keys": "*i64"}
    sizes = ("m", "length", "groups", "width", "query_stride", "bank_stride", "share", "m_bucket", "l_bucket")
    constants = {
        "BLOCK_D": block, "RESIDENT": True, "EVEN": True, "WIDE": queries != bank,
        "PRECISION": "tf32x3" if "*fp32" in (queries, bank) else None, "EXCLUDE": False, **constants,
    }  # fmt: skip
    odd = ("m", "length", "groups", "m_bucket", "l_bucket", "chosen")
    case = CompileCase(name, kernel, types | dict.fromkeys(sizes, "i32"), constants, configs, fits, odd)
    known = case.function().arg_names
    return replace(case, constants={name: value for name, value in constants.items() if name in known})


def compile_cases() -> list[CompileCase]:
    chunks = {"RESIDENT": False, "EVEN": False, "EXCLUDE": True}
    return [
        nearest_case("nearest k=1, D=256, bf16", "*bf16", "*bf16", block=256),
        nearest_case("nearest k=1, D=1000, fp16, exclude", "*fp16", "*fp16", block=64, configs=CONFIGS[2:3], **chunks),
        nearest_case("nearest k=1, fp32 queries, bf16 bank", "*fp32", "*bf16", block=32, RESIDENT=False),
    ]
