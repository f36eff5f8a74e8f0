"""A step of k-means on a GPU: the fused search assigns, then each centre adds up its rows, in order.

Rows are sorted by centre (stable, so that the order of a sum is that of the rows), and a program adds the rows of
one centre, which it gathers. No atomics: the same inputs give the same sums. Few centres are shared out over
several programs each, whose partial sums are added at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.nearest import fused_best_one
from kernels.fused.tuning import CompileCase

BLOCK_ELEMENTS = 4096  # of rows that a program holds at a time


@triton.jit
def _add_rows(
    x, order, offsets, sums, centres, width, stride, NORMALISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums [shares, K, D] of every share's rows of a centre; NORMALISE: of the rows divided by their norms."""
    centre, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = tl.load(offsets + centre), tl.load(offsets + centre + 1)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin + share * BLOCK_M, end, shares * BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        row = tl.load(order + at, mask=at < end, other=0)
        inside = (at[:, None] < end) & (d[None, :] < width)
        rows = tl.load(x + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORMALISE:
            # Squares of what is divided by the largest element neither overflow nor vanish.
            largest = tl.max(tl.abs(rows), axis=1)
            largest = tl.where(largest > 0, largest, 1.0)
            rows = rows / largest[:, None]
            norm = tl.sqrt(tl.sum(rows * rows, axis=1))
            rows = rows / tl.maximum(norm, 1e-12 / largest)[:, None]
        total += tl.sum(rows, axis=0)
    out = (share * centres + centre).to(tl.int64) * width + d
    tl.store(sums + out, total, mask=d < width)


def fused_assign(x: Tensor, centres: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """ids [M] int64, sums [K, D] float32 and counts [K] int64 of rows x [M, D], M >= 1."""
    with torch.cuda.device_of(x):
        if metric == "cosine":
            centres, scale = scaled(centres)
            _, ids = fused_best_one(x, centres, scale=scale)
        else:
            _, ids = fused_best_one(x, centres, bias=centres.float().square().sum(1).mul_(-0.5))
        ids.clamp_(min=0)  # a row of NaN has no nearest centre
        sums, counts = sums_of_rows(x, ids, len(centres), normalise=metric == "cosine")
    return ids, sums, counts


def scaled(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of norm 1 to 2, and 1 / norm: a power of two takes nothing from 16-bit centres, as normalising would."""
    wide = centres.double()
    norms = torch.linalg.vector_norm(wide, dim=1)
    power = torch.exp2(1 - torch.frexp(norms.clamp_min(1e-300)).exponent.double())
    # A norm below 1e-12 counts as 1e-12: its cosines shrink towards 0.
    return (wide * power[:, None]).to(centres.dtype), (norms.clamp_min(1e-12) * power).reciprocal().float()


def sums_of_rows(x: Tensor, ids: Tensor, centres: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """sums [K, D] float32 and counts [K] int64 of the rows x [M, D] with each id."""
    x = x if x.stride(1) == 1 else x.contiguous()
    ordered, order = ids.to(torch.int32).sort(stable=True)
    bounds = torch.arange(centres + 1, dtype=torch.int32, device=x.device)
    offsets = torch.searchsorted(ordered, bounds, out_int32=True)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    rows = max(1, min(32, BLOCK_ELEMENTS // block))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    shares = max(1, min(4 * processors // centres, triton.cdiv(len(x), 8 * rows * centres)))
    partial = torch.empty(shares, centres, width, dtype=torch.float32, device=x.device)
    _add_rows[(centres, shares)](
        x, order, offsets, partial, centres, width, x.stride(0),
        NORMALISE=normalise, BLOCK_M=rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return partial.sum(0) if shares > 1 else partial[0], offsets.diff().to(torch.int64)


def compile_cases() -> list[CompileCase]:
    from kernels.fused.nearest import CONFIGS, nearest_case

    types = {"x": "*bf16", "order": "*i64", "offsets": "*i32", "sums": "*fp32", "centres": "i32", "width": "i32"}
    types["stride"] = "i32"
    sums = {"BLOCK_M": BLOCK_ELEMENTS // 256, "BLOCK_D": 256, "NORMALISE": True}
    return [
        nearest_case("kmeans, cosine, D=256, bf16", "*bf16", "*bf16", block=256, configs=CONFIGS[1:3], SCALE=True),
        nearest_case(
            "kmeans, euclidean, D=128, fp32", "*fp32", "*fp32", block=32, configs=CONFIGS[:2], RESIDENT=False, BIAS=True
        ),
        CompileCase("sums of kmeans, D=256, bf16", _add_rows, types, sums, odd=("centres",)),
    ]
