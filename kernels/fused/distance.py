"""Distance correlation in Triton: inner products of centred rows, distances, centred sums, and back.

`_gram` reads the features once, centring them as they come, and makes the upper half of their inner products; sums
over many columns are taken in short runs, since tensor cores round towards zero what they add up. What is left of
|x|² + |y|² - 2xy for close rows is rounding, so `_measure_close` takes the difference of those. Everything on [n, n] is
float64 arithmetic on float32 distances, one program a row. Nothing is added by atomics. See `kernels.distance` for the
formulas and `kernels.distance_tiled` for the same steps in PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import tf32_allowed
from kernels.fused.launching import on
from kernels.fused.products import product
from kernels.fused.tuning import CompileCase

_TILE = 64
_RUN = 512  # columns that are added up in tensor cores before a sum is rounded to nearest
# Three TF32 products keep each operand twice: with fewer warps or wider blocks it would not fit into registers.
_GRAM_BLOCK_K = 16
_GRAM_LAUNCH = {"num_warps": 8, "num_stages": 2}
_APPLY_LAUNCH = {"num_warps": 8, "num_stages": 3}
_NEAR = 64  # columns of one program of `_measure_close`


class Side(NamedTuple):
    """What is kept of x or y: the rows where a gradient is wanted, mean and scale of them, distances and their sums."""

    rows: Tensor | None
    mean: Tensor  # [p] float32, of scaled rows
    scale: Tensor  # [] float32, a power of two that brings the largest number near 1
    distances: Tensor  # [n, n] float32, of scaled rows
    sums: Tensor  # [n] float64, of each row's distances
    total: Tensor  # [] float64


@triton.jit
def _load_centred(x, mean, scale, rows, columns, n, p, row_stride, column_stride):
    """A block of scaled and centred rows in float32, zeros outside."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < n)[:, None] & (columns < p)[None, :]
    block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    centre = tl.load(mean + columns, mask=columns < p, other=0.0)
    return tl.where(inside, block - centre[None, :], 0.0)


@triton.jit(do_not_specialize=["n"])
def _gram(
    x, mean, scale, gram, n, p, columns_a_split, row_stride, column_stride,
    PRECISION: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gram[split] = x @ x.T over the split's columns, [n, n] float32; tiles below the diagonal are left as they are."""
    if tl.program_id(1) >= tl.program_id(0):
        down = tl.program_id(0) * TILE + tl.arange(0, TILE)
        across = tl.program_id(1) * TILE + tl.arange(0, TILE)
        factor = tl.load(scale)
        total = tl.zeros((TILE, TILE), tl.float32)
        begin = tl.program_id(2) * columns_a_split
        end = tl.minimum(begin + columns_a_split, p)
        for first in range(begin, end, RUN):
            run = tl.zeros((TILE, TILE), tl.float32)
            for left in range(first, tl.minimum(first + RUN, end), BLOCK_K):
                columns = left + tl.arange(0, BLOCK_K)
                a = _load_centred(x, mean, factor, down, columns, n, p, row_stride, column_stride)
                b = _load_centred(x, mean, factor, across, columns, n, p, row_stride, column_stride)
                run = product(a, b.T, run, PRECISION)
            total += run
        at = (tl.program_id(2) * n.to(tl.int64) + down)[:, None] * n + across[None, :]
        tl.store(gram + at, total, mask=(down < n)[:, None] & (across < n)[None, :])


@triton.jit
def _squared(gram, row, columns, n):
    """Squared distances of a row to `columns`, float64, from the upper half of the inner products; and |x|² + |y|²."""
    inside = columns < n
    first, second = tl.minimum(columns, row), tl.maximum(columns, row)
    both = tl.load(gram + first.to(tl.int64) * n + second, mask=inside, other=0.0)
    own = tl.load(gram + row.to(tl.int64) * n + row)
    norms = own + tl.load(gram + columns.to(tl.int64) * (n + 1), mask=inside, other=0.0)
    return norms - 2.0 * both, norms


@triton.jit(do_not_specialize=["n"])
def _measure_close(
    x, mean, scale, gram, close, n, p, row_stride, column_stride, NEAR: tl.constexpr, BLOCK: tl.constexpr
):
    """close[i, j], i < j: the squared distance by differences, of rows whose inner products cannot tell it."""
    row = tl.program_id(0)
    factor = tl.load(scale)
    columns = tl.program_id(1) * NEAR + tl.arange(0, NEAR)
    squared, norms = _squared(gram, row, columns, n)
    wanted = ((squared < 0.01 * norms) & (columns > row) & (columns < n)).to(tl.int32)
    if tl.max(wanted, 0) > 0:
        for place in range(NEAR):
            if tl.sum(tl.where(tl.arange(0, NEAR) == place, wanted, 0), 0) > 0:
                other = tl.program_id(1) * NEAR + place
                total = tl.zeros((BLOCK,), tl.float32)
                for left in range(0, p, BLOCK):
                    at = left + tl.arange(0, BLOCK)
                    offsets = at.to(tl.int64) * column_stride
                    one = tl.load(x + row.to(tl.int64) * row_stride + offsets, mask=at < p, other=0.0)
                    two = tl.load(x + other.to(tl.int64) * row_stride + offsets, mask=at < p, other=0.0)
                    difference = one.to(tl.float32) * factor - two.to(tl.float32) * factor
                    total += difference * difference
                tl.store(close + row.to(tl.int64) * n + other, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n"])
def _distances(gram, close, distances, sums, n, BLOCK: tl.constexpr):
    """One row of distances and its sum."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for left in range(0, n, BLOCK):
        columns = left + tl.arange(0, BLOCK)
        inside = columns < n
        squared, norms = _squared(gram, row, columns, n)
        first, second = tl.minimum(columns, row), tl.maximum(columns, row)
        measured = tl.load(close + first.to(tl.int64) * n + second, mask=inside, other=0.0).to(tl.float64)
        squared = tl.where(squared < 0.01 * norms, measured, squared)
        squared = tl.where(squared < 0, 0.0, squared)  # a GPU's maximum of NaN and 0 is 0
        found = tl.where(inside & (columns != row), tl.sqrt(squared), 0.0).to(tl.float32)
        tl.store(distances + row.to(tl.int64) * n + columns, found, mask=inside)
        total += found.to(tl.float64)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _centred(distances, sums, total, row, columns, n, UNBIASED: tl.constexpr):
    """A row of distances, and centred, in float64."""
    inside = columns < n
    a = tl.load(distances + row.to(tl.int64) * n + columns, mask=inside, other=0.0).to(tl.float64)
    across = tl.load(sums + columns, mask=inside, other=0.0)
    both = tl.load(sums + row) + across
    count = n.to(tl.float64)
    if UNBIASED:
        centred = a - both / (count - 2.0) + tl.load(total) / ((count - 1.0) * (count - 2.0))
        centred = tl.where(inside & (columns != row), centred, 0.0)
    else:
        centred = tl.where(inside, a - both / count + tl.load(total) / (count * count), 0.0)
    return a, centred


@triton.jit(do_not_specialize=["n"])
def _moments(a, a_sums, a_total, b, b_sums, b_total, moments, n, UNBIASED: tl.constexpr, BLOCK: tl.constexpr):
    """moments[row] = the row's sums of A B, A A and B B."""
    row = tl.program_id(0)
    cross = tl.zeros((BLOCK,), tl.float64)
    own = tl.zeros((BLOCK,), tl.float64)
    other = tl.zeros((BLOCK,), tl.float64)
    for left in range(0, n, BLOCK):
        columns = left + tl.arange(0, BLOCK)
        _, first = _centred(a, a_sums, a_total, row, columns, n, UNBIASED)
        _, second = _centred(b, b_sums, b_total, row, columns, n, UNBIASED)
        cross += first * second
        own += first * first
        other += second * second
    tl.store(moments + 3 * row, tl.sum(cross, 0))
    tl.store(moments + 3 * row + 1, tl.sum(own, 0))
    tl.store(moments + 3 * row + 2, tl.sum(other, 0))


@triton.jit(do_not_specialize=["n"])
def _laplacian(
    a, a_sums, a_total, b, b_sums, b_total, slopes, laplacian, n, UNBIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of the matrix that the rows of x are multiplied by, float32; slopes: as for `gradient`."""
    row = tl.program_id(0)
    of_cross, of_own = tl.load(slopes), tl.load(slopes + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for left in range(0, n, BLOCK):
        columns = left + tl.arange(0, BLOCK)
        distance, first = _centred(a, a_sums, a_total, row, columns, n, UNBIASED)
        _, second = _centred(b, b_sums, b_total, row, columns, n, UNBIASED)
        pull = 2.0 * of_cross * second + 4.0 * of_own * first
        pull = tl.where(distance == 0, 0.0, pull / tl.where(distance == 0, 1.0, distance))
        total += pull
        at = laplacian + row.to(tl.int64) * n + columns
        tl.store(at, -pull.to(tl.float32), mask=(columns < n) & (columns != row))
    tl.store(laplacian + row.to(tl.int64) * n + row, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _apply(
    laplacian, x, mean, scale, out, n, p, row_stride, column_stride,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = laplacian @ (x - mean), times what x was scaled by, [n, p] in x's dtype."""
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    factor = tl.load(scale)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, n, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        weights = tl.load(
            laplacian + rows.to(tl.int64)[:, None] * n + inner[None, :],
            mask=(rows < n)[:, None] & (inner < n)[None, :], other=0.0,
        )  # fmt: skip
        block = _load_centred(x, mean, factor, inner, columns, n, p, row_stride, column_stride)
        total = product(weights, block, total, PRECISION)
    at = rows.to(tl.int64)[:, None] * p + columns.to(tl.int64)[None, :]
    inside = (rows < n)[:, None] & (columns < p)[None, :]
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=inside)


def distances(rows: Tensor, group: dist.ProcessGroup | None) -> Side:
    """As `kernels.distance_tiled.distances`, of rows scaled so that no square leaves the range of float32."""
    n, p = rows.shape
    largest = torch.linalg.vector_norm(rows, float("inf"), dtype=torch.float32)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # A power of two, so that nothing is rounded; one that is no denormal number.
    scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-126, 126))
    mean = rows.mean(0, dtype=torch.float64).mul_(scale).float()
    splits, a_split = _splits(n, p, rows.device)
    parts = torch.empty(splits, n, n, dtype=torch.float32, device=rows.device)
    tiles = triton.cdiv(n, _TILE)
    with on(rows.device):
        _gram[(tiles, tiles, splits)](
            rows, mean, scale, parts, n, p, a_split, *rows.stride(),
            PRECISION=_precision(), TILE=_TILE, RUN=_RUN, BLOCK_K=_GRAM_BLOCK_K, **_GRAM_LAUNCH,
        )  # fmt: skip
        gram = parts.sum(0, dtype=torch.float64)
        if group is not None:
            dist.all_reduce(gram, group=group)
        close = torch.zeros(n, n, dtype=torch.float32, device=rows.device)
        _measure_close[(n, triton.cdiv(n, _NEAR))](
            rows, mean, scale, gram, close, n, p, *rows.stride(), NEAR=_NEAR, BLOCK=1024
        )
        if group is not None:
            dist.all_reduce(close, group=group)
        found = torch.empty_like(close)
        sums = torch.empty(n, dtype=torch.float64, device=rows.device)
        _distances[(n,)](gram, close, found, sums, n, BLOCK=_row_block(n))
    return Side(rows, mean, scale, found, sums, sums.sum())


def moments(x: Side, y: Side, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of A B, A A and B B."""
    n = len(x.distances)
    of_rows = torch.empty(n, 3, dtype=torch.float64, device=x.distances.device)
    with on(x.distances.device):
        _moments[(n,)](
            x.distances, x.sums, x.total, y.distances, y.sums, y.total, of_rows, n,
            UNBIASED=unbiased, BLOCK=_row_block(n),
        )  # fmt: skip
    cross, own_x, own_y = of_rows.sum(0)
    return cross, own_x, own_y


def gradient(own: Side, other: Side, slopes: Tensor, unbiased: bool) -> Tensor:
    """As `kernels.distance_tiled.gradient`."""
    assert own.rows is not None
    n, p = own.rows.shape
    laplacian = torch.empty_like(own.distances)
    found = torch.empty(n, p, dtype=own.rows.dtype, device=own.rows.device)
    with on(own.rows.device):
        _laplacian[(n,)](
            own.distances, own.sums, own.total, other.distances, other.sums, other.total, slopes, laplacian, n,
            UNBIASED=unbiased, BLOCK=_row_block(n),
        )  # fmt: skip
        _apply[(triton.cdiv(p, _TILE), triton.cdiv(n, _TILE))](
            laplacian, own.rows, own.mean, own.scale, found, n, p, *own.rows.stride(),
            PRECISION=_precision(), TILE=_TILE, BLOCK_K=32, **_APPLY_LAUNCH,
        )  # fmt: skip
    return found


def _splits(n: int, p: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts the columns are divided, so that all multiprocessors work, and how wide these are."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiles = triton.cdiv(n, _TILE) * (triton.cdiv(n, _TILE) + 1) // 2
    a_split = triton.cdiv(triton.cdiv(p, max(1, 4 * processors // tiles)), _RUN) * _RUN
    return triton.cdiv(p, a_split), a_split


def _precision() -> str:
    return "tf32" if tf32_allowed() else "tf32x3"


def _row_block(n: int) -> int:
    return min(512, triton.next_power_of_2(n))


def compile_cases() -> list[CompileCase]:
    types = {"x": "*fp32", "mean": "*fp32", "scale": "*fp32", "out": "*fp32"}
    strides = {"row_stride": "i32", "column_stride": "i32", "n": "i32", "p": "i32", "columns_a_split": "i32"}
    square: dict[str, Any] = {
        "gram": "*fp64", "close": "*fp32", "distances": "*fp32", "sums": "*fp64", "slopes": "*fp64",
        "laplacian": "*fp32", "moments": "*fp64", "a": "*fp32", "b": "*fp32", "n": "i32",
    } | dict.fromkeys(("a_sums", "a_total", "b_sums", "b_total"), "*fp64")  # fmt: skip
    product_constants = {"PRECISION": "tf32x3", "TILE": _TILE, "BLOCK_K": 32}
    centring = {"UNBIASED": True, "BLOCK": 512}
    odd = ("n", "column_stride")
    return [
        CompileCase(
            "distance inner products", _gram, types | strides | {"gram": "*fp32"},
            product_constants | {"RUN": _RUN, "BLOCK_K": _GRAM_BLOCK_K}, 
            [triton.Config({}, **_GRAM_LAUNCH)], odd=odd,
        ),
        CompileCase(
            "distance of close rows", _measure_close, types | strides | square, {"NEAR": _NEAR, "BLOCK": 1024}, odd=odd
        ),
        CompileCase("distance from inner products", _distances, square, {"BLOCK": 512}, odd=odd),
        CompileCase("distance moments", _moments, square, centring, odd=odd),
        CompileCase("distance laplacian", _laplacian, square, centring, odd=odd),
        CompileCase(
            "distance gradient", _apply, types | strides | square, product_constants,
            [triton.Config({}, **_APPLY_LAUNCH)], odd=odd,
        ),
    ]  # fmt: skip
