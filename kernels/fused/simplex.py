"""The simplex loss in Triton: sums over posteriors and pulls between them (rows alone are in `posteriors`).

`_log_sums` visits the inner products of the posteriors tile by tile and keeps the sums of their powers, of rows in
registers, of columns one number a block of rows. `_pull` makes the tiles again, turns each into weights and multiplies
them with the columns' posteriors at once; rows and columns change roles for the other view's gradient. Nothing is
added by atomics: parts are summed in a fixed order. Logarithms are in base 2 inside, natural outside. See
`kernels.simplex` for the formulas and `kernels.simplex_tiled` for the same steps in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import tf32_allowed
from kernels.fused.launching import columns_a_split, on
from kernels.fused.posteriors import WIDEST_BLOCK, posteriors, through_posterior
from kernels.fused.products import product
from kernels.fused.tuning import CompileCase, bucket, tuned
from kernels.simplex_tiled import Settings

__all__ = ["log_sums", "posteriors", "pull", "pull_both", "through_posterior"]

_GRANULE = 64  # the least BLOCK_M and BLOCK_N, and what the tables of sums are made for
_ROWS_A_LAUNCH = 8192  # bounds the table of the columns' sums, [rows / _GRANULE, columns]


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


FORWARD = [_config(64, 64, 32, 8, 2), _config(128, 64, 32, 8, 3), _config(128, 128, 32, 8, 3)]
BACKWARD = [
    _config(64, 32, 32, 4, 2),
    _config(128, 32, 32, 8, 2),
    _config(64, 64, 32, 8, 2),
    _config(128, 64, 32, 8, 2),
]


def _forward_fits(config: triton.Config, arguments: Mapping[str, Any], shared: int) -> bool:
    """Three TF32 products keep each operand twice: too many registers for the largest tiles."""
    large = config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] > 128 * 64
    return not (large and arguments["PRECISION"] == "tf32x3")


def _backward_fits(config: triton.Config, arguments: Mapping[str, Any], shared: int) -> bool:
    return config.kwargs["BLOCK_N"] == 32 or arguments["PRECISION"] == "tf32"


@triton.jit
def _ratios(
    x, y, rows, columns, x_rows, y_rows, total,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of N x @ y.T."""
    x_pointers = x + rows.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    y_pointers = y + columns.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(0, D, BLOCK_K):
        x_part = tl.load(x_pointers + part, mask=(rows < x_rows)[:, None], other=0.0)
        y_part = tl.load(y_pointers + part, mask=(columns < y_rows)[:, None], other=0.0)
        products = product(x_part, y_part.T, products, PRECISION)
    return products * total


@tuned(FORWARD, key=["rows_bucket", "columns_bucket", "D", "LINEAR", "FIT", "PRECISION"], fits=_forward_fits)
@triton.jit(do_not_specialize=["x_rows", "start", "rows_bucket", "columns_bucket"])
def _log_sums(
    x, y, row_table, column_table, x_rows, y_rows, columns_a_split, start, total, floor, exponent,
    rows_bucket, columns_bucket,
    LINEAR: tl.constexpr, FIT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """row_table[split, row] and column_table[row // GRANULE, column]: log2 of sums of r^exponent off the diagonal.

    LINEAR: the exponent is 1. FIT: the powers may be summed as they are.
    """
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_exists = rows < x_rows
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        ratios = _ratios(x, y, rows, columns, x_rows, y_rows, total, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        ratios = tl.maximum(ratios, floor, propagate_nan=tl.PropagateNan.ALL)
        counts = row_exists[:, None] & (columns < y_rows)[None, :] & (start + rows[:, None] != columns[None, :])
        if FIT:
            powers = ratios
            if not LINEAR:
                powers = tl.exp2(tl.log2(ratios) * exponent)
            powers = tl.where(counts, powers, 0.0)
            row_sums += tl.sum(powers, 1)
            of_columns = tl.log2(tl.sum(powers, 0))
        else:
            # The online maximum of Milakov & Gimelshein (arXiv:1805.02867).
            logits = tl.where(counts, tl.log2(ratios) * exponent, float("-inf"))
            new_most = tl.maximum(most, tl.max(logits, 1))
            shift = tl.where(new_most == float("-inf"), 0.0, new_most)
            row_sums = row_sums * tl.exp2(most - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            most = new_most
            column_most = tl.max(logits, 0)
            column_shift = tl.where(column_most == float("-inf"), 0.0, column_most)
            of_columns = column_shift + tl.log2(tl.sum(tl.exp2(logits - column_shift[None, :]), 0))
        for part in tl.static_range(BLOCK_M // GRANULE):
            if part > 0:
                of_columns = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            granule = columns.to(tl.int64) * 0 + first_row // GRANULE + part
            exists = (columns < y_rows) & (granule * GRANULE < x_rows)
            tl.store(column_table + granule * y_rows + columns, of_columns, mask=exists)
    shift = tl.where(most == float("-inf"), 0.0, most)
    tl.store(row_table + tl.program_id(1).to(tl.int64) * x_rows + rows, tl.log2(row_sums) + shift, mask=row_exists)


@triton.jit(do_not_specialize=["parts", "count"])
def _combine(table, out, parts, count, BLOCK: tl.constexpr):
    """out[i] = ln of the sum of 2^table[part, i] over the parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        value = tl.load(table + at, mask=inside, other=float("-inf"))
        table += count
        new_most = tl.maximum(most, value)
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        sums = sums * tl.exp2(most - shift) + tl.exp2(value - shift)
        most = new_most
    shift = tl.where(most == float("-inf"), 0.0, most)
    tl.store(out + at, (tl.log2(sums) + shift) * 0.6931471805599453, mask=inside)


@tuned(BACKWARD, key=["rows_bucket", "columns_bucket", "D", "LINEAR", "FIT", "PRECISION"], fits=_backward_fits)
@triton.jit(do_not_specialize=["x_rows", "start", "rows_bucket", "columns_bucket"])
def _pull(
    x, y, log_rows, log_columns, pulled, x_rows, y_rows, columns_a_split, start, total, floor, power, uniform,
    rows_bucket, columns_bucket,
    LINEAR: tl.constexpr, FIT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pulled[split, row] = sum over the split's columns of r^power (1/R_row + 1/C_column) (y - uniform)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < x_rows
    dimensions = tl.arange(0, BLOCK_D)
    of_rows = tl.load(log_rows + rows, mask=row_exists, other=0.0) * 1.4426950408889634
    part_of_d = tl.program_id(2) * BLOCK_D
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        inside = columns < y_rows
        ratios = _ratios(x, y, rows, columns, x_rows, y_rows, total, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        of_columns = tl.load(log_columns + columns, mask=inside, other=0.0) * 1.4426950408889634
        floored = ratios < floor  # false for NaN, which has to reach the gradient
        counts = inside[None, :] & (start + rows[:, None] != columns[None, :])
        ratios = tl.maximum(ratios, floor, propagate_nan=tl.PropagateNan.ALL)
        if FIT:
            w = tl.exp2(-of_rows)[:, None] + tl.exp2(-of_columns)[None, :]
            if not LINEAR:
                w *= tl.exp2(tl.log2(ratios) * power)
        else:
            powers = tl.log2(ratios) * power
            w = tl.exp2(powers - of_rows[:, None]) + tl.exp2(powers - of_columns[None, :])
        w = tl.where(floored, 0.0, tl.where(counts, w, 0.0))
        y_tile = tl.load(
            y + columns.to(tl.int64)[:, None] * D + part_of_d + dimensions[None, :], mask=inside[:, None], other=0.0
        )
        gradient = product(w, y_tile - uniform, gradient, PRECISION)
    at = (tl.program_id(1).to(tl.int64) * x_rows + rows)[:, None] * D + part_of_d + dimensions[None, :]
    tl.store(pulled + at, gradient, mask=row_exists[:, None])


def log_sums(rows: Tensor, columns: Tensor, start: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """As `kernels.simplex_tiled.log_sums`."""
    n, m = len(rows), len(columns)
    of_rows = rows.new_empty(n)
    of_columns = torch.empty(0)
    for top in range(0, n, _ROWS_A_LAUNCH):
        some = rows[top : top + _ROWS_A_LAUNCH]
        a_split = columns_a_split(len(some), m, rows.device, 64, _GRANULE)
        row_table = rows.new_empty(triton.cdiv(m, a_split), len(some))
        column_table = rows.new_empty(triton.cdiv(len(some), _GRANULE), m)
        with on(rows.device):
            _log_sums[partial(_grid, len(some), len(row_table))](
                some, columns, row_table, column_table, len(some), m, a_split, start + top, float(settings.total),
                settings.floor, 1 / settings.temperature, bucket(len(some)), bucket(m),
                GRANULE=_GRANULE, **_constants(rows, settings, block_d=False),
            )  # fmt: skip
        of_rows[top : top + len(some)] = _combined(row_table)
        part = _combined(column_table)
        of_columns = part if top == 0 else torch.logaddexp(of_columns, part)
    return of_rows, of_columns


def pull(
    rows: Tensor, columns: Tensor, log_rows: Tensor, log_columns: Tensor, start: int, settings: Settings
) -> Tensor:
    """As `kernels.simplex_tiled.pull`, but in parts that are still to be summed: [splits, n, padded C]."""
    n, m, width = len(rows), len(columns), rows.shape[1]
    a_split = columns_a_split(n, m, rows.device, 64, _GRANULE)
    pulled = rows.new_empty(triton.cdiv(m, a_split), n, width)
    constants = _constants(rows, settings)
    with on(rows.device):
        _pull[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), len(pulled), width // constants["BLOCK_D"])](
            rows, columns, log_rows, log_columns, pulled, n, m, a_split, start, float(settings.total), settings.floor,
            1 / settings.temperature - 1, 1 / settings.classes, bucket(n), bucket(m), **constants,
        )  # fmt: skip
    return pulled


def pull_both(
    rows: Tensor, columns: Tensor, log_rows: Tensor, log_columns: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """`pull` of the rows and of the columns. Two launches: a tile shared by both would need atomics."""
    return (
        pull(rows, columns, log_rows, log_columns, 0, settings),
        pull(columns, rows, log_columns, log_rows, 0, settings),
    )


def _grid(rows: int, splits: int, meta: Mapping[str, Any]) -> tuple[int, int]:
    return triton.cdiv(rows, meta["BLOCK_M"]), splits


def _combined(table: Tensor) -> Tensor:
    parts, count = table.shape
    out = table.new_empty(count)
    with on(table.device):
        _combine[(triton.cdiv(count, 128),)](table, out, parts, count, BLOCK=128)
    return out


def _constants(rows: Tensor, settings: Settings, block_d: bool = True) -> dict[str, Any]:
    exact = not settings.fast and not tf32_allowed()
    block = {"BLOCK_D": min(rows.shape[1], WIDEST_BLOCK)} if block_d else {}
    return block | {
        "LINEAR": settings.temperature == 1,
        "FIT": settings.powers_fit(rows.dtype),
        "PRECISION": "tf32x3" if exact else "tf32",
        "D": rows.shape[1],
    }


def compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(
        ("x", "y", "row_table", "column_table", "log_rows", "log_columns", "pulled"), "*fp32"
    ) | dict.fromkeys(("x_rows", "y_rows", "columns_a_split", "start", "rows_bucket", "columns_bucket"), "i32")
    types |= dict.fromkeys(("total", "floor", "exponent", "power", "uniform"), "fp32")
    odd = ("x_rows", "y_rows", "start", "rows_bucket", "columns_bucket")
    cases = []
    for c, linear, precision in ((128, False, "tf32x3"), (1024, True, "tf32")):
        constants = {"LINEAR": linear, "FIT": linear, "PRECISION": precision, "D": c}
        what = f"C={c}, {precision}"
        cases.append(
            CompileCase(
                f"simplex forward, {what}",
                _log_sums,
                types,
                constants | {"GRANULE": _GRANULE},
                fits=_forward_fits,
                odd=odd,
            )
        )
        cases.append(
            CompileCase(
                f"simplex backward, {what}", _pull, types, constants | {"BLOCK_D": 128}, fits=_backward_fits, odd=odd
            )
        )
    return cases
