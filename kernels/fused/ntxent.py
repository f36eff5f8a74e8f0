"""NT-Xent in Triton: normalise, sum, pull and go back through the normalisation, one launch each.

Norms, positives, exponentials and sums are float32. The products with the negatives are made of float16: a row of
norm 1 needs no exponent, and float16 has three bits more than bfloat16 to say it with. Where float32 is asked for,
a row is split into the sum of two float16 rows, and three products of these make one that is as good.
See `kernels.ntxent` for the formulas and `kernels.ntxent_tiled` for the same four steps in PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import contrastive
from kernels.fused.contrastive import SYMMETRIC, LeftOut, Operand
from kernels.fused.launching import on
from kernels.fused.products import rounded
from kernels.fused.tuning import CompileCase
from kernels.ntxent_tiled import HIT_SLACK, RowSums

# exp(logit - 1/τ) and 1/l stay within float32 for τ >= 0.024; below, each row needs its own maximum.
_CONSTANT_SHIFT_FROM = 0.024


@triton.jit
def _unit(rows, norm_floor):
    """[R, D] -> the rows divided by their norms, and the norms [R]; squares of the largest numbers do not overflow."""
    largest = tl.max(tl.abs(rows), 1)
    scale = tl.where(largest > 0, largest, 1.0)
    scaled = rows / scale[:, None]
    norms = scale * tl.sqrt(tl.sum(scaled * scaled, 1))
    return rows / tl.maximum(norms, norm_floor)[:, None], norms


@triton.jit
def _load_pairs(
    z1, z2, pairs, columns, inside, z1_row, z1_column, z2_row, z2_column
):  # fmt: skip
    rows = pairs.to(tl.int64)[:, None]
    first = tl.load(z1 + rows * z1_row + columns[None, :] * z1_column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(z2 + rows * z2_row + columns[None, :] * z2_column, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["n"])
def _normalise(
    z1, z2, anchors, norms, positive, n, d, z1_row, z1_column, z2_row, z2_column, inverse_temperature,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Unit rows of both views into anchors [2N, WIDTH], zeros behind column d; norms [2N]; positives' logits [N].

    SPLIT: anchors is [2N, 2 WIDTH], the unit rows as float16 and behind them what that lacks, as float16 again.
    """
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BLOCK_D)
    inside = (pairs < n)[:, None] & (columns < d)[None, :]
    first, second = _load_pairs(z1, z2, pairs, columns, inside, z1_row, z1_column, z2_row, z2_column)
    first, first_norms = _unit(first, 1e-12)
    second, second_norms = _unit(second, 1e-12)
    tl.store(positive + pairs, tl.sum(first * second, 1) * inverse_temperature, mask=pairs < n)
    tl.store(norms + pairs, first_norms, mask=pairs < n)
    tl.store(norms + n + pairs, second_norms, mask=pairs < n)
    stored = (pairs < n)[:, None] & (columns < WIDTH)[None, :]
    at = anchors + pairs.to(tl.int64)[:, None] * (2 * WIDTH if SPLIT else WIDTH) + columns[None, :]
    second_at = at + n.to(tl.int64) * (2 * WIDTH if SPLIT else WIDTH)
    tl.store(at, first.to(tl.float16), mask=stored)
    tl.store(second_at, second.to(tl.float16), mask=stored)
    if SPLIT:
        tl.store(at + WIDTH, (first - first.to(tl.float16).to(tl.float32)).to(tl.float16), mask=stored)
        tl.store(second_at + WIDTH, (second - second.to(tl.float16).to(tl.float32)).to(tl.float16), mask=stored)


@triton.jit(do_not_specialize=["n"])
def _through_normalisation(
    pulled, z1, z2, norms, margin, upstream, gradient1, gradient2, n, d,
    z1_row, z1_column, z2_row, z2_column, splits, factor,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Sums the splits of `pulled`, adds the positives' share, takes out the radial part, divides by the norm."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.arange(0, BLOCK_D)
    exists = pairs < n
    inside = exists[:, None] & (columns < d)[None, :]
    first, second = _load_pairs(z1, z2, pairs, columns, inside, z1_row, z1_column, z2_row, z2_column)
    first_norms = tl.load(norms + pairs, mask=exists, other=1.0)
    second_norms = tl.load(norms + n + pairs, mask=exists, other=1.0)
    first /= tl.maximum(first_norms, 1e-12)[:, None]
    second /= tl.maximum(second_norms, 1e-12)[:, None]

    first_gradient = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    second_gradient = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    at = pulled + pairs.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    for _ in range(splits):
        first_gradient += tl.load(at, mask=inside, other=0.0)
        second_gradient += tl.load(at + n.to(tl.int64) * WIDTH, mask=inside, other=0.0)
        at += 2 * n.to(tl.int64) * WIDTH
    first_margin = tl.load(margin + pairs, mask=exists, other=0.0)
    second_margin = tl.load(margin + n + pairs, mask=exists, other=0.0)
    towards = (tl.sigmoid(first_margin) + tl.sigmoid(second_margin))[:, None]
    first_gradient -= towards * second
    second_gradient -= towards * first

    scale = tl.load(upstream).to(tl.float32) * factor
    radial = tl.where(first_norms >= 1e-12, tl.sum(first_gradient * first, 1), 0.0)
    first_gradient = (first_gradient - radial[:, None] * first) * (scale / tl.maximum(first_norms, 1e-12))[:, None]
    radial = tl.where(second_norms >= 1e-12, tl.sum(second_gradient * second, 1), 0.0)
    second_gradient = (second_gradient - radial[:, None] * second) * (scale / tl.maximum(second_norms, 1e-12))[:, None]
    out = pairs.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(gradient1 + out, rounded(first_gradient, gradient1.dtype.element_ty), mask=inside)
    tl.store(gradient2 + out, rounded(second_gradient, gradient2.dtype.element_ty), mask=inside)


def normalise(z1: Tensor, z2: Tensor, temperature: float, exact_products: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [2N, padded D] (twice as wide for exact products), norms [2N], positive logits [N]."""
    n, d = z1.shape
    width = contrastive.padded_width(d, exact_products)
    anchors = z1.new_empty(2 * n, 2 * width if exact_products else width, dtype=torch.float16)
    norms, positive = z1.new_empty(2 * n, dtype=torch.float32), z1.new_empty(n, dtype=torch.float32)
    block = _row_block(width)
    with on(z1.device):
        _normalise[(triton.cdiv(n, block["PAIRS"]),)](
            z1,
            z2,
            anchors,
            norms,
            positive,
            n,
            d,
            *z1.stride(),
            *z2.stride(),
            1 / temperature,
            WIDTH=width,
            SPLIT=exact_products,
            **block,
        )
    return anchors, norms, positive


def sum_rows(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    start: int,
    temperature: float,
    exact_products: bool,
    hits: bool,
) -> RowSums:
    left_out = LeftOut(SYMMETRIC, start=start, half=len(anchors) // 2)
    constant = temperature >= _CONSTANT_SHIFT_FROM
    operands = Operand(anchors, exact_products), Operand(candidates, exact_products)
    slack = HIT_SLACK[torch.float32 if exact_products else torch.float16]
    rows = contrastive.sum_rows(*operands, positive, left_out, temperature, constant, hits, slack)
    return RowSums(*rows, kept=None)


def pull_of_negatives(
    anchors: Tensor,
    candidates: Tensor,
    log_sums: Tensor,
    start: int,
    temperature: float,
    exact_products: bool,
    kept: Tensor | None,
) -> Tensor:
    """[splits, 2N, padded D] float32."""
    del kept
    left_out = LeftOut(SYMMETRIC, start=start, half=len(anchors) // 2)
    constant = temperature >= _CONSTANT_SHIFT_FROM
    operands = Operand(anchors, exact_products), Operand(candidates, exact_products)
    return contrastive.pull(*operands, log_sums, None, left_out, temperature, constant)


def through_normalisation(
    pull: Tensor,
    z1: Tensor,
    z2: Tensor,
    anchors: Tensor,
    norms: Tensor,
    margin: Tensor,
    upstream: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor]:
    del anchors  # rounded to the dtype of the products
    n, d = z1.shape
    gradient1, gradient2 = z1.new_empty(n, d), z1.new_empty(n, d)
    splits, _, width = pull.shape
    block = _row_block(width)
    with on(z1.device):
        _through_normalisation[(triton.cdiv(n, block["PAIRS"]),)](
            pull, z1, z2, norms, margin, upstream, gradient1, gradient2, n, d,
            *z1.stride(), *z2.stride(), splits, factor, WIDTH=width, **block,
        )  # fmt: skip
    return gradient1, gradient2


def _row_block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "PAIRS": max(1, 1024 // block)}


def compile_cases() -> list[CompileCase]:
    strides = ("z1_row", "z1_column", "z2_row", "z2_column")
    types = dict.fromkeys(("norms", "positive", "pulled", "margin", "upstream"), "*fp32") | {"anchors": "*fp16"}
    types |= dict.fromkeys(("z1", "z2", "gradient1", "gradient2"), "*bf16")
    types |= dict.fromkeys(("n", "d", "splits", *strides), "i32")
    types |= dict.fromkeys(("inverse_temperature", "factor"), "fp32")
    return [
        CompileCase(
            f"rows: {name}, D={width}",
            kernel,
            types,
            {"WIDTH": width, **_row_block(width), **more},
            odd=("n", "splits"),
        )
        for width in (128, 1024)
        for name, kernel, more in (
            ("normalise", _normalise, {"SPLIT": True}),
            ("through normalisation", _through_normalisation, {}),
        )
    ]
