"""Posteriors on the simplex in Triton: softplus along a row, divided by its sum; and back.

Row by row, one launch for both views. See `kernels.simplex_tiled` for the same in PyTorch. A row with NaN becomes all
NaN: a GPU's maximum of NaN and a number is the number, unless `propagate_nan` says otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launching import on
from kernels.fused.tuning import CompileCase

WIDEST_BLOCK = 128  # columns of float32 posteriors that a tile of them holds


@triton.jit
def _softplus(x):
    """log(1 + e^x) for x >= -12, to the last digit although 1 + t is rounded (Goldberg 1991, theorem 4)."""
    t = tl.exp(-tl.abs(x))
    rounded = 1.0 + t
    return tl.maximum(x, 0.0) + tl.where(
        rounded == 1.0, t, tl.log(rounded) * t / tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    )


@triton.jit
def _load_scaled(z, rows, columns, inside, row_stride, column_stride, beta):
    """beta z in float32, with infinities as the largest number: what is too large is as large as any."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    x = tl.load(z + at, mask=inside, other=0.0).to(tl.float32) * beta
    x = tl.maximum(x, -3.4028234e38, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 3.4028234e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _posterior(x, inside):
    """softplus(x) / its row sum, computed from the logarithm of softplus; zero outside."""
    high = tl.maximum(x, -12.0, propagate_nan=tl.PropagateNan.ALL)
    t = tl.exp(tl.minimum(x, -12.0))
    logarithm = tl.where(x < -12.0, x - 0.5 * t + (5.0 / 24.0) * t * t, tl.log(_softplus(high)))
    logarithm = tl.where(inside, logarithm, float("-inf"))
    most = tl.max(logarithm, 1)
    most = tl.where(most == float("-inf"), 0.0, most)  # of rows outside
    share = tl.where(inside, tl.exp(logarithm - most[:, None]), 0.0)
    total = tl.sum(share, 1)
    return tl.where(inside, share / tl.where(total == 0, 1.0, total)[:, None], 0.0)


@triton.jit(do_not_specialize=["n"])
def _posteriors(
    z1, z2, posterior1, posterior2, agreement, n, c, z1_row, z1_column, z2_row, z2_column, beta,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Posteriors of both views into [N, WIDTH], zeros behind column c; inner products of partners into [N]."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BLOCK_C)
    inside = (pairs < n)[:, None] & (columns < c)[None, :]
    first = _posterior(_load_scaled(z1, pairs, columns, inside, z1_row, z1_column, beta), inside)
    second = _posterior(_load_scaled(z2, pairs, columns, inside, z2_row, z2_column, beta), inside)
    tl.store(agreement + pairs, tl.sum(first * second, 1), mask=pairs < n)
    stored = (pairs < n)[:, None] & (columns < WIDTH)[None, :]
    at = pairs.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(posterior1 + at, first, mask=stored)
    tl.store(posterior2 + at, second, mask=stored)


@triton.jit(do_not_specialize=["n", "splits"])
def _through_posterior(
    z, posterior, pulled, partner, repulsion, factor, gradient, n, c, splits, z_row, z_column, beta, uniform,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Sums the splits of `pulled`, takes off the positives', and goes back through the posterior."""
    rows = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BLOCK_C)
    exists = rows < n
    inside = exists[:, None] & (columns < c)[None, :]
    x = _load_scaled(z, rows, columns, inside, z_row, z_column, beta)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    own = tl.load(posterior + at, mask=inside, other=0.0)
    positive = tl.load(partner + at, mask=inside, other=0.0)
    total = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    for _ in range(splits):
        total += tl.load(pulled + at, mask=inside, other=0.0)
        at += n.to(tl.int64) * WIDTH
    total -= tl.load(repulsion + rows, mask=exists, other=0.0)[:, None] * (positive - uniform)
    total = own * (total - tl.sum(total * own, 1)[:, None])
    high = tl.maximum(x, -12.0, propagate_nan=tl.PropagateNan.ALL)
    t = tl.exp(tl.minimum(x, -12.0))
    slope = tl.where(x < -12.0, 1.0 - 0.5 * t + (5.0 / 12.0) * t * t, tl.sigmoid(high) / _softplus(high))
    total *= slope * (tl.load(factor) * beta)
    out = rows.to(tl.int64)[:, None] * c + columns[None, :]
    tl.store(gradient + out, total.to(gradient.dtype.element_ty), mask=inside)


def posteriors(z1: Tensor, z2: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """π of both views [N, padded C] and the inner products of partners [N], all float32."""
    n, c = z1.shape
    posterior1, posterior2 = z1.new_empty(2, n, _width(c), dtype=torch.float32)
    agreement = z1.new_empty(n, dtype=torch.float32)
    block = _row_block(c)
    with on(z1.device):
        _posteriors[(triton.cdiv(n, block["PAIRS"]),)](
            z1, z2, posterior1, posterior2, agreement, n, c, *z1.stride(), *z2.stride(), beta, **block
        )
    return posterior1, posterior2, agreement


def through_posterior(
    z: Tensor, posterior: Tensor, pulled: Tensor, partner: Tensor, repulsion: Tensor, factor: Tensor, beta: float
) -> Tensor:
    """The gradient to z [N, C], in its dtype, of the `pulled` posteriors and of their positives."""
    n, c = z.shape
    gradient = torch.empty(n, c, dtype=z.dtype, device=z.device)
    block = _row_block(c)
    with on(z.device):
        _through_posterior[(triton.cdiv(n, block["PAIRS"]),)](
            z, posterior, pulled, partner, repulsion, factor.float(), gradient, n, c, len(pulled), *z.stride(), beta,
            1 / c, **block,
        )  # fmt: skip
    return gradient


def _width(c: int) -> int:
    block = min(max(32, triton.next_power_of_2(c)), WIDEST_BLOCK)
    return triton.cdiv(c, block) * block


def _row_block(c: int) -> dict[str, int]:
    block = triton.next_power_of_2(_width(c))
    return {"WIDTH": _width(c), "BLOCK_C": block, "PAIRS": max(1, 1024 // block)}


def compile_cases() -> list[CompileCase]:
    rows = ("z", "z1", "z2", "gradient")
    types = dict.fromkeys(rows, "*bf16") | dict.fromkeys(
        ("posterior", "posterior1", "posterior2", "agreement", "pulled", "partner", "repulsion", "factor"), "*fp32"
    )
    types |= dict.fromkeys(
        ("n", "c", "splits", "z_row", "z_column", "z1_row", "z1_column", "z2_row", "z2_column"), "i32"
    )
    types |= {"beta": "fp32", "uniform": "fp32"}
    odd = ("n", "c", "splits", "z_column", "z1_column", "z2_column")
    return [
        CompileCase("posteriors, C=128", _posteriors, types, _row_block(128), odd=odd),
        CompileCase("gradient of posteriors, C=1024", _through_posterior, types, _row_block(1024), odd=odd),
    ]
