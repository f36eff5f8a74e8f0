"""The Bregman loss in Triton: hard winners in one pass over the scores, soft ones in tiles of their divergences.

The only atomics count winners, in integers, whose sum does not depend on the order. See `kernels.bregman` for the
formulas and `kernels.bregman_tiled` for the same steps in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import tf32_allowed
from kernels.fused.launching import columns_a_split, on
from kernels.fused.products import product
from kernels.fused.tuning import CompileCase, bucket, tuned

LOG2_E = 1.4426950408889634
_GRANULE = 64  # a split of the columns starts at a multiple of it, as of every BLOCK_N
_WIDEST_BLOCK = 128  # columns of float32 rows that a tile holds


@triton.jit
def _load_scores(scores, rows, columns, exists, k):
    """A block of float32 scores; -inf behind the last column."""
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    inside = exists[:, None] & (columns < k)[None, :]
    return tl.load(scores + at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _expm1(x, power):
    """e^x - 1 of x and its power e^x, to the last digits: by its Taylor series where the difference would lose them."""
    series = 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(tl.abs(x) < 0.5, series * x, power - 1.0)


@triton.jit(do_not_specialize=["count"])
def _winners(scores, winner, counts, count, k, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """The place of each row's highest score, the first of equals; counts[c] += how often c has won."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < count
    block = _load_scores(scores, rows, tl.arange(0, BLOCK_K), exists, k)
    first = tl.argmax(tl.where(block != block, float("inf"), block), 1)  # NaN wins, as in torch.argmax
    tl.store(winner + rows, first.to(tl.int64), mask=exists)
    tl.atomic_add(counts + first, tl.full((ROWS,), 1, tl.int64), mask=exists)


@triton.jit(do_not_specialize=["count"])
def _hard_rows(
    scores, winner, counts, factor, losses, gradient, count, k, width, inverse_temperature,
    GRADIENT: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """GRADIENT: factor dL_i/ds_i into gradient [2N, K], else L_i into losses [2N]. width: 1 / 2σ²."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < count
    partners = tl.where(rows < count // 2, rows + count // 2, rows - count // 2)
    columns = tl.arange(0, BLOCK_K)
    block = _load_scores(scores, rows, columns, exists, k)
    own = tl.load(winner + rows, mask=exists, other=0).to(tl.int32)
    partner = tl.load(winner + partners, mask=exists, other=0).to(tl.int32)
    at_own = own[:, None] == columns[None, :]
    at_partner = partner[:, None] == columns[None, :]

    # A maximum need not keep NaN, but no loss may come out finite if there was one.
    highest = tl.max(block, 1) + tl.sum(tl.where(block != block, block, 0.0), 1)
    divergence = tl.where((columns < k)[None, :], tl.where(exists, highest, 0.0)[:, None] - block, 0.0)
    exponent = -width * divergence
    similarity = tl.exp(exponent)
    logits = _expm1(exponent, similarity) * inverse_temperature
    negatives = tl.load(counts + columns, mask=columns < k, other=0).to(tl.int32)[None, :]
    negatives = negatives - at_own.to(tl.int32) - at_partner.to(tl.int32)
    some = (negatives > 0) & (columns < k)[None, :]
    positive = tl.sum(tl.where(at_partner, logits, 0.0), 1)

    most = tl.maximum(tl.max(tl.where(some, logits, float("-inf")), 1), positive)
    powers = tl.maximum(negatives, 0).to(tl.float32) * tl.exp(tl.where(some, logits - most[:, None], float("-inf")))
    negative = tl.sum(powers, 1)
    own_power = tl.exp(positive - most)
    if GRADIENT:
        # Two identities instead of two subtractions of nearly equal numbers: a softmax's gradient sums to 0 over its
        # columns, and the loss does not change if all scores of a row are raised.
        share = tl.where(at_partner, 0.0, powers / (negative + own_power)[:, None])
        share = tl.where(at_partner, -tl.sum(share, 1)[:, None], share)
        pull = tl.where(at_own, 0.0, share * similarity)
        pull = tl.where(at_own, -tl.sum(pull, 1)[:, None], pull)
        pull *= tl.load(factor) * (width * inverse_temperature)
        at = rows.to(tl.int64)[:, None] * k + columns[None, :]
        inside = exists[:, None] & (columns < k)[None, :]
        tl.store(gradient + at, pull.to(gradient.dtype.element_ty), mask=inside)
    else:
        # log(1 + x) to the last digit although 1 + x is rounded (Goldberg 1991, theorem 4): a small loss is all x.
        x = negative / tl.maximum(own_power, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        rounded = 1.0 + x
        log1p = tl.where(rounded == 1.0, x, tl.log(rounded) * x / tl.where(rounded == 1.0, 1.0, rounded - 1.0))
        # The positive may be so far below the highest negative that its power is 0.
        loss = tl.where(x < 1e4, log1p, most - positive + tl.log(negative + own_power))
        tl.store(losses + rows, loss, mask=exists)


@triton.jit
def _exponents(
    x, y, rows, columns, x_rows, y_rows, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of -scale x @ y.T, in base 2."""
    x_pointers = x + rows.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    y_pointers = y + columns.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(0, D, BLOCK_K):
        x_part = tl.load(x_pointers + part, mask=(rows < x_rows)[:, None], other=0.0)
        y_part = tl.load(y_pointers + part, mask=(columns < y_rows)[:, None], other=0.0)
        products = product(x_part, y_part.T, products, PRECISION)
    return products * (-1.4426950408889634 * scale)


@triton.jit
def _negatives(rows, columns, x_rows, y_rows, start):
    """[BLOCK_M, BLOCK_N] bool: neither a row's self nor its positive."""
    partners = tl.where(rows < x_rows // 2, rows + x_rows // 2, rows - x_rows // 2)
    distinct = (columns[None, :] != start + rows[:, None]) & (columns[None, :] != start + partners[:, None])
    return distinct & (rows < x_rows)[:, None] & (columns < y_rows)[None, :]


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


FORWARD = [_config(64, 64, 32, 4, 2), _config(128, 64, 32, 8, 3)]
BACKWARD = [_config(64, 32, 16, 4, 2), _config(64, 32, 32, 8, 2)]


@tuned(FORWARD, key=["rows_bucket", "columns_bucket", "D", "PRECISION"])
@triton.jit(do_not_specialize=["x_rows", "start", "rows_bucket", "columns_bucket"])
def _soft_margins(
    x, y, positive, table, x_rows, y_rows, columns_a_split, start, width, inverse_temperature,
    rows_bucket, columns_bucket,
    PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """table[split, row] = log2 of the sum over the split's negatives of exp(logit - the positive's)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = inverse_temperature * 1.4426950408889634
    own = tl.load(positive + rows, mask=rows < x_rows, other=0.0) * 1.4426950408889634
    total = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        exponents = _exponents(x, y, rows, columns, x_rows, y_rows, width, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        logits = _expm1(exponents * 0.6931471805599453, tl.exp2(exponents)) * scale - own[:, None]
        logits = tl.where(_negatives(rows, columns, x_rows, y_rows, start), logits, float("-inf"))
        # The online maximum of Milakov & Gimelshein (arXiv:1805.02867).
        new_most = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        total = total * tl.exp2(most - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        most = new_most
    shift = tl.where(most == float("-inf"), 0.0, most)
    tl.store(table + tl.program_id(1).to(tl.int64) * x_rows + rows, tl.log2(total) + shift, mask=rows < x_rows)


@tuned(BACKWARD, key=["rows_bucket", "columns_bucket", "D", "OF_ROWS", "PRECISION"])
@triton.jit(do_not_specialize=["x_rows", "start", "rows_bucket", "columns_bucket"])
def _soft_pull(
    x, y, sums, pulled, x_rows, y_rows, columns_a_split, start, width, inverse_temperature,
    rows_bucket, columns_bucket,
    OF_ROWS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pulled[split, row] = sum over the split's negatives of share times similarity times y."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < x_rows
    dimensions = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = inverse_temperature * 1.4426950408889634
    if OF_ROWS:
        row_positive = tl.load(sums + 2 * rows, mask=row_exists, other=0.0) * 1.4426950408889634
        row_above = tl.load(sums + 2 * rows + 1, mask=row_exists, other=0.0) * 1.4426950408889634
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        inside = columns < y_rows
        exponents = _exponents(x, y, rows, columns, x_rows, y_rows, width, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        logits = _expm1(exponents * 0.6931471805599453, tl.exp2(exponents)) * scale
        if OF_ROWS:
            w = logits - row_positive[:, None] - row_above[:, None]
        else:
            positive = tl.load(sums + 2 * columns, mask=inside, other=0.0) * 1.4426950408889634
            above = tl.load(sums + 2 * columns + 1, mask=inside, other=0.0) * 1.4426950408889634
            w = logits - positive[None, :] - above[None, :]
        negatives = _negatives(rows, columns, x_rows, y_rows, start)
        w = tl.exp2(tl.where(negatives, w + exponents, float("-inf")))
        y_tile = tl.load(y + columns.to(tl.int64)[:, None] * D + dimensions[None, :], mask=inside[:, None], other=0.0)
        gradient = product(w, y_tile, gradient, PRECISION)
    at = (tl.program_id(1).to(tl.int64) * x_rows + rows)[:, None] * D + dimensions[None, :]
    tl.store(pulled + at, gradient, mask=row_exists[:, None])


def winners(scores: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.bregman_tiled.winners`."""
    count, k = scores.shape
    winner = torch.empty(count, dtype=torch.int64, device=scores.device)
    counts = torch.zeros(k, dtype=torch.int64, device=scores.device)
    block = _row_block(k)
    with on(scores.device):
        _winners[(triton.cdiv(count, block["ROWS"]),)](scores, winner, counts, count, k, **block)
    return winner, counts


def hard_losses(scores: Tensor, winner: Tensor, counts: Tensor, sigma: float, temperature: float) -> Tensor:
    """As `kernels.bregman_tiled.hard_losses`."""
    losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    _launch_hard_rows(scores, winner, counts, losses, losses, losses, sigma, temperature, gradient=False)
    return losses


def hard_gradient(
    scores: Tensor, winner: Tensor, counts: Tensor, sigma: float, temperature: float, factor: Tensor
) -> Tensor:
    """As `kernels.bregman_tiled.hard_gradient`."""
    gradient = torch.empty_like(scores)
    _launch_hard_rows(scores, winner, counts, factor.float(), gradient, gradient, sigma, temperature, gradient=True)
    return gradient


def _launch_hard_rows(
    scores: Tensor,
    winner: Tensor,
    counts: Tensor,
    factor: Tensor,
    losses: Tensor,
    out: Tensor,
    sigma: float,
    temperature: float,
    gradient: bool,
) -> None:
    count, k = scores.shape
    block = _row_block(k)
    with on(scores.device):
        _hard_rows[(triton.cdiv(count, block["ROWS"]),)](
            scores, winner, counts, factor, losses, out, count, k, 1 / (2 * sigma**2), 1 / temperature,
            GRADIENT=gradient, **block,
        )  # fmt: skip


def prepare(rows: Tensor) -> Tensor:
    """Rows padded with zeros to what the tiles take."""
    block = min(max(32, triton.next_power_of_2(rows.shape[1])), _WIDEST_BLOCK)
    return F.pad(rows, (0, -rows.shape[1] % block))


def soft_margins(costs: Tensor, choices: Tensor, positive: Tensor, start: int, scales: tuple[float, float]) -> Tensor:
    """As `kernels.bregman_tiled.soft_margins`, of padded rows."""
    n, m = len(costs), len(choices)
    a_split = columns_a_split(n, m, costs.device, 64, _GRANULE)
    table = costs.new_empty(triton.cdiv(m, a_split), n)
    with on(costs.device):
        _soft_margins[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), len(table))](
            costs, choices, positive, table, n, m, a_split, start, *scales, bucket(n), bucket(m),
            PRECISION=_precision(), D=costs.shape[1],
        )  # fmt: skip
    return table.mul_(math.log(2)).logsumexp(0)


def soft_pull(x: Tensor, y: Tensor, sums: Tensor, start: int, scales: tuple[float, float], of_rows: bool) -> Tensor:
    """As `kernels.bregman_tiled.soft_pull`, of padded rows."""
    n, m, width = len(x), len(y), x.shape[1]
    block = min(width, _WIDEST_BLOCK)
    a_split = columns_a_split(n, m, x.device, 64, _GRANULE)
    pulled = x.new_empty(triton.cdiv(m, a_split), n, width)
    with on(x.device):
        _soft_pull[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), len(pulled), width // block)](
            x, y, sums, pulled, n, m, a_split, start, *scales, bucket(n), bucket(m),
            OF_ROWS=of_rows, PRECISION=_precision(), D=width, BLOCK_D=block,
        )  # fmt: skip
    return pulled.sum(0)


def _precision() -> str:
    return "tf32" if tf32_allowed() else "tf32x3"


def _row_block(k: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(k))
    return {"BLOCK_K": block, "ROWS": max(1, 1024 // block)}


def compile_cases() -> list[CompileCase]:
    hard: Mapping[str, Any] = {
        "scores": "*bf16", "winner": "*i64", "counts": "*i64", "factor": "*fp32", "losses": "*fp32",
        "gradient": "*bf16", "count": "i32", "k": "i32", "width": "fp32", "inverse_temperature": "fp32",
    }  # fmt: skip
    blocks = {"BLOCK_K": 128, "ROWS": 8}
    cases = [CompileCase("bregman winners, K=100", _winners, hard, blocks, odd=("count", "k"))]
    for gradient in (False, True):
        name = f"bregman hard {'backward' if gradient else 'forward'}, K=100"
        cases.append(CompileCase(name, _hard_rows, hard, blocks | {"GRADIENT": gradient}, odd=("count", "k")))
    soft = dict.fromkeys(("x", "y", "positive", "table", "sums", "pulled"), "*fp32")
    soft |= dict.fromkeys(("x_rows", "y_rows", "columns_a_split", "start", "rows_bucket", "columns_bucket"), "i32")
    soft |= dict.fromkeys(("width", "inverse_temperature"), "fp32")
    odd = ("x_rows", "y_rows", "start", "rows_bucket", "columns_bucket")
    constants: dict[str, Any] = {"PRECISION": "tf32x3", "D": 128}
    cases.append(CompileCase("bregman soft forward, K=100", _soft_margins, soft, constants, odd=odd))
    backward = constants | {"BLOCK_D": 128, "OF_ROWS": False}
    cases.append(CompileCase("bregman soft backward, K=100", _soft_pull, soft, backward, odd=odd))
    return cases
