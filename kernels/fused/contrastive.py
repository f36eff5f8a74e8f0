"""Softmax over similarities without their matrix: one forward and one backward kernel, for two losses.

`_sum_rows` visits the similarities of a block of rows with all columns, tile by tile, and keeps one sum a row.
`_pull` makes the tiles again, turns each into weights and multiplies them with the columns at once, as flash
attention does with its values; it serves NT-Xent, whose matrix is symmetric, in one call, and the general
row-against-column loss in two, rows and columns changing roles. Nothing is added by atomics: where there are too
few rows for all multiprocessors, the columns are split and the parts summed in a fixed order.

Left out of a row are up to two columns, its positive and another. Those of NT-Xent follow from the row's number,
those of `contrastive_loss` come as indices. Logarithms are in base 2 inside, natural outside.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import tf32_allowed
from kernels.fused.launching import columns_a_split, on
from kernels.fused.products import product, rounded
from kernels.fused.tuning import CompileCase, bucket, tuned

LOG2_E = 1.4426950408889634
SYMMETRIC, OF_ROWS, OF_COLUMNS = range(3)  # KIND: whose positives and excluded columns a tile leaves out
# float16 has no exponent for weights of 1e-8, so they are 2^14 times as large inside the product (and 2 at most).
_SHIFT = tl.constexpr(14.0)
_GRANULE = 128  # a split of the columns starts at a multiple of it, as of every BLOCK_N


def _fits(config: triton.Config, arguments: Mapping[str, Any], shared: int, backward: bool) -> bool:
    """Whether the tiles in flight fit into shared memory, and what a warp adds up into its registers."""
    block_m, block_n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    split = arguments["SPLIT"]
    wide = split or arguments["BLOCK_D"] > 128 or arguments["D"] != arguments["BLOCK_D"]
    logits_a_warp = 1024 if wide else 2048
    if shared < 200 * 1024:
        # Before Hopper the tensor cores take their operands from registers, too.
        logits_a_warp //= 4 if split else 2
    if not backward:
        logits_a_warp *= 2
    if block_m * block_n > logits_a_warp * config.num_warps:
        return False
    row_bytes = 2 * arguments["BLOCK_D"] * (2 if split else 1)
    return row_bytes * (block_m + block_n * config.num_stages) + 4096 <= shared


def _config(block_m: int, block_n: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


SMALL = _config(64, 32, 8, 2)  # fits everywhere
FORWARD = [SMALL, _config(64, 64, 4, 2), _config(128, 64, 8, 3), _config(128, 128, 8, 2), _config(128, 128, 8, 3)]
BACKWARD = [SMALL, _config(64, 64, 8, 2), _config(64, 64, 4, 2), _config(128, 64, 8, 2), _config(128, 128, 8, 2)]
_forward_fits = functools.partial(_fits, backward=False)
_backward_fits = functools.partial(_fits, backward=True)


@triton.jit
def _load(rows_of, rows, count, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from column `first` of a matrix whose rows are WIDTH apart; zeros where there is no row."""
    at = rows.to(tl.int64)[:, None] * WIDTH + first + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(rows_of + at, mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _logits(
    x, x_tile, x_low, y, rows, columns, x_rows, y_rows, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of x @ y.T * scale, and the tiles of y, if D is no wider than BLOCK_D (else their last part)."""
    WIDTH: tl.constexpr = 2 * D if SPLIT else D
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y_tile = tl.zeros((BLOCK_N, BLOCK_D), y.dtype.element_ty)
    y_low = y_tile
    if D == BLOCK_D:
        y_tile = _load(y, columns, y_rows, 0, WIDTH, BLOCK_D)
        products = product(x_tile, y_tile.T, products)
        if SPLIT:
            y_low = _load(y, columns, y_rows, D, WIDTH, BLOCK_D)
            products = product(x_tile, y_low.T, products)
            products = product(x_low, y_tile.T, products)
    else:
        for part in range(0, D, BLOCK_D):
            x_part = _load(x, rows, x_rows, part, WIDTH, BLOCK_D)
            y_part = _load(y, columns, y_rows, part, WIDTH, BLOCK_D)
            products = product(x_part, y_part.T, products)
            if SPLIT:
                products = product(x_part, _load(y, columns, y_rows, D + part, WIDTH, BLOCK_D).T, products)
                products = product(_load(x, rows, x_rows, D + part, WIDTH, BLOCK_D), y_part.T, products)
    return products * scale, y_tile, y_low


@triton.jit
def _tile_has_gaps(
    first_row, left, row_positive, row_exclude, y_rows, start, half,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile holds columns that some row leaves out: true for few, so that the rest pay nothing."""
    right = left + BLOCK_N
    gaps = right > y_rows
    if KIND == 0:
        # Rows first_row … + BLOCK_M meet themselves and their partners on three diagonals.
        offset = first_row + start
        for diagonal in tl.static_range(3):
            shifted = offset + (diagonal - 1) * half
            gaps = gaps | ((left < shifted + BLOCK_M) & (right > shifted))
    if KIND == 1:
        left_out = (row_positive >= left) & (row_positive < right) | (row_exclude >= left) & (row_exclude < right)
        gaps = gaps | (tl.max(left_out.to(tl.int32), 0) > 0)
    return gaps


@triton.jit
def _left_in(
    rows, columns, row_positive, row_exclude, column_positive, column_exclude, y_rows, start, half,
    KIND: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] bool: the negatives."""
    inside = (columns < y_rows)[None, :]
    if KIND == 0:
        partners = tl.where(rows < half, rows + half, rows - half)
        left_out = (columns[None, :] == start + rows[:, None]) | (columns[None, :] == start + partners[:, None])
    elif KIND == 1:
        left_out = (columns[None, :] == row_positive[:, None]) | (columns[None, :] == row_exclude[:, None])
    else:
        left_out = (rows[:, None] == column_positive[None, :]) | (rows[:, None] == column_exclude[None, :])
    return inside & (left_out == 0)


@triton.jit
def _load_left_out(positive, exclude, at, count):
    """The positive and the excluded column of each of `at`, -1 where there is none."""
    inside = at < count
    positives = tl.load(positive + at, mask=inside, other=-1)
    excluded = tl.load(exclude + at, mask=inside, other=-1)
    return positives.to(tl.int32), excluded.to(tl.int32)


@tuned(FORWARD, key=["rows_bucket", "columns_bucket", "D", "CONSTANT_SHIFT", "HITS", "SPLIT"], fits=_forward_fits)
@triton.jit(do_not_specialize=["rows_bucket", "columns_bucket", "start", "half"])
def _sum_rows(
    x, y, positive, exclude, sums, highest, x_rows, y_rows, columns_a_split, start, half, scale, unit,
    rows_bucket, columns_bucket,
    KIND: tl.constexpr, CONSTANT_SHIFT: tl.constexpr, HITS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums[split, row] = log2 of the sum over the split's columns of 2^(scale x.y); highest: the largest exponent."""
    if SCALED:
        scale *= tl.load(unit)
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = 2 * D if SPLIT else D
    x_tile = _load(x, rows, x_rows, 0, WIDTH, BLOCK_D)
    x_low = _load(x, rows, x_rows, WIDTH - D, WIDTH, BLOCK_D)
    row_positive, row_exclude = rows, rows
    if KIND == 1:
        row_positive, row_exclude = _load_left_out(positive, exclude, rows, x_rows)
    total = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        logits, _, _ = _logits(
            x, x_tile, x_low, y, rows, columns, x_rows, y_rows, scale, BLOCK_M, BLOCK_N, D, BLOCK_D, SPLIT
        )
        if _tile_has_gaps(first_row, left, row_positive, row_exclude, y_rows, start, half, KIND, BLOCK_M, BLOCK_N):
            left_in = _left_in(rows, columns, row_positive, row_exclude, columns, columns, y_rows, start, half, KIND)
            logits = tl.where(left_in, logits, float("-inf"))
        if CONSTANT_SHIFT:
            if HITS:
                most = tl.maximum(most, tl.max(logits, 1))
            total += tl.sum(tl.exp2(logits - scale), 1)
        else:
            # The online maximum of Milakov & Gimelshein (arXiv:1805.02867).
            new_most = tl.maximum(most, tl.max(logits, 1))
            shift = tl.where(new_most == float("-inf"), 0.0, new_most)
            total = total * tl.exp2(most - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            most = new_most
    shift = scale
    if not CONSTANT_SHIFT:
        shift = tl.where(most == float("-inf"), 0.0, most)
    at = tl.program_id(1).to(tl.int64) * x_rows + rows
    tl.store(sums + at, tl.log2(total) + shift, mask=rows < x_rows)
    if HITS:
        tl.store(highest + at, most, mask=rows < x_rows)


@tuned(BACKWARD, key=["rows_bucket", "columns_bucket", "D", "KIND", "CONSTANT_SHIFT", "SPLIT"], fits=_backward_fits)
@triton.jit(do_not_specialize=["rows_bucket", "columns_bucket", "start", "half"])
def _pull(
    x, y, positive, exclude, log_sums, weights, pulled, x_rows, y_rows, columns_a_split, start, half, scale, unit,
    rows_bucket, columns_bucket,
    KIND: tl.constexpr, CONSTANT_SHIFT: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """pulled[split, row] = sum over the split's columns of w y, where with e = exp(x.y / τ) and l the row sums

    KIND 0: w = e (1/l_row + 1/l_column);  1: w = weights_row e / l_row;  2: w = weights_column e / l_column.
    """
    if SCALED:
        scale *= tl.load(unit)
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    dimensions = tl.arange(0, BLOCK_D)
    WIDTH: tl.constexpr = 2 * D if SPLIT else D
    x_tile = _load(x, rows, x_rows, 0, WIDTH, BLOCK_D)
    x_low = _load(x, rows, x_rows, WIDTH - D, WIDTH, BLOCK_D)
    row_positive, row_exclude = rows, rows
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    row_weights = tl.zeros((BLOCK_M,), tl.float32)
    if KIND == 0:
        row_sums = tl.load(log_sums + start + rows, mask=rows < x_rows, other=float("inf")) * 1.4426950408889634
    if KIND == 1:
        row_positive, row_exclude = _load_left_out(positive, exclude, rows, x_rows)
        row_sums = tl.load(log_sums + rows, mask=rows < x_rows, other=float("inf")) * 1.4426950408889634
        row_weights = tl.load(weights + rows, mask=rows < x_rows, other=0.0)
    part_of_d = tl.program_id(2) * BLOCK_D
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = tl.program_id(1) * columns_a_split
    end = tl.minimum(begin + columns_a_split, y_rows)
    for left in range(begin, end, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        inside = columns < y_rows
        logits, y_tile, y_low = _logits(
            x, x_tile, x_low, y, rows, columns, x_rows, y_rows, scale, BLOCK_M, BLOCK_N, D, BLOCK_D, SPLIT
        )
        if KIND == 1:
            w = tl.exp2(logits - row_sums[:, None] + _SHIFT) * row_weights[:, None]
        else:
            column_sums = tl.load(log_sums + columns, mask=inside, other=float("inf")) * 1.4426950408889634
            if KIND == 2:
                column_weights = tl.load(weights + columns, mask=inside, other=0.0)
                w = tl.exp2(logits - column_sums[None, :] + _SHIFT) * column_weights[None, :]
            elif CONSTANT_SHIFT:
                both = tl.exp2(scale - row_sums)[:, None] + tl.exp2(scale - column_sums)[None, :]
                w = tl.exp2(logits - (scale - _SHIFT)) * both
            else:
                w = tl.exp2(logits - row_sums[:, None] + _SHIFT) + tl.exp2(logits - column_sums[None, :] + _SHIFT)
        if KIND == 2:
            # As in every tile, each column may leave out any two rows.
            column_positive, column_exclude = _load_left_out(positive, exclude, columns, y_rows)
            w = tl.where(
                _left_in(rows, columns, rows, rows, column_positive, column_exclude, y_rows, start, half, KIND), w, 0.0
            )
        elif _tile_has_gaps(first_row, left, row_positive, row_exclude, y_rows, start, half, KIND, BLOCK_M, BLOCK_N):
            left_in = _left_in(rows, columns, row_positive, row_exclude, columns, columns, y_rows, start, half, KIND)
            w = tl.where(left_in, w, 0.0)
        if D != BLOCK_D:
            y_tile = _load(y, columns, y_rows, part_of_d, WIDTH, BLOCK_D)
            y_low = _load(y, columns, y_rows, WIDTH - D + part_of_d, WIDTH, BLOCK_D)
        w_tile = rounded(w, y_tile.dtype)
        total = product(w_tile, y_tile, total)
        if SPLIT:
            total = product(w_tile, y_low, total)
            total = product((w - w_tile.to(tl.float32)).to(y_tile.dtype), y_tile, total)
    at = (tl.program_id(1).to(tl.int64) * x_rows + rows)[:, None] * D + part_of_d + dimensions[None, :]
    tl.store(pulled + at, total * (1.0 / 16384), mask=(rows < x_rows)[:, None])


@triton.jit
def _finish_rows(
    sums, highest, positive, loss, margin, log_sums, hits, rows_count, period, splits, slack,
    HITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the splits; of each row, the loss log(1 + e^margin), the margin and the log of the sum of all."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < rows_count
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        part = tl.load(sums + rows, mask=inside, other=float("-inf"))
        sums += rows_count
        new_most = tl.maximum(most, part)
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        total = total * tl.exp2(most - shift) + tl.exp2(part - shift)
        most = new_most
    negative = tl.where(total == 0, float("-inf"), tl.log2(total) + most) * 0.6931471805599453
    own = tl.load(positive + rows % period, mask=inside, other=0.0)
    difference = negative - own
    # log(1 + x) to the last digit although 1 + x is rounded (Goldberg 1991, theorem 4): a small loss is all x.
    x = tl.exp(-tl.abs(difference))
    rounded = 1.0 + x
    log1p = tl.where(rounded == 1.0, x, tl.log(rounded) * x / tl.where(rounded == 1.0, 1.0, rounded - 1.0))
    tl.store(loss + rows, tl.maximum(difference, 0.0) + log1p, mask=inside)
    tl.store(margin + rows, difference, mask=inside)
    tl.store(log_sums + rows, tl.maximum(negative, own) + log1p, mask=inside)
    if HITS:
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for _ in range(splits):
            top = tl.maximum(top, tl.load(highest + rows, mask=inside, other=float("-inf")))
            highest += rows_count
        ahead = (own - slack * tl.abs(own)) * 1.4426950408889634 > top
        tl.store(hits + rows, ahead.to(tl.int8), mask=inside)


class LeftOut(NamedTuple):
    """Which columns a row leaves out: by place (`start`, `half`) or by index [M] int64 (-1: none)."""

    kind: int
    positive: Tensor | None = None
    exclude: Tensor | None = None
    start: int = 0
    half: int = 0


def block_width(d: int, split: bool) -> int:
    """Columns of a row that a tile holds: all of them up to 256 (or 128, split), else parts of 128 (or 64)."""
    resident = 128 if split else 256
    return max(16, triton.next_power_of_2(d)) if d <= resident else resident // 2


def padded_width(d: int, split: bool) -> int:
    block = block_width(d, split)
    return triton.cdiv(d, block) * block


class Operand(NamedTuple):
    """Rows as the products take them: [M, width] of 16 bits, or [M, 2 width], two parts whose sum they are."""

    rows: Tensor
    split: bool
    unit: Tensor | float = 1.0  # what 1 stands for: a power of two, as float16 has no room for any scale

    @property
    def width(self) -> int:
        return self.rows.shape[1] // 2 if self.split else self.rows.shape[1]

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype) -> Operand:
        """Of `rows` [M, D] for products in `dtype`; float32 is float16 twice, or once if TF32 would do."""
        split = dtype == torch.float32 and not tf32_allowed()
        missing = padded_width(rows.shape[1], split) - rows.shape[1]
        if dtype != torch.float32:
            rows = rows.to(dtype)
            return cls(torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous(), False)
        # The largest entry becomes 2^15 at most, near the top of float16: entries 2^-18 as large keep 22 bits.
        # An infinite or NaN entry is to spoil its own row only.
        largest = rows.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        exponent = (torch.frexp(largest).exponent - 15).clamp_min(-100)
        unit = torch.ldexp(torch.ones((), device=rows.device), exponent)
        rows = torch.nn.functional.pad(torch.ldexp(rows, -exponent), (0, missing))
        high = rows.half()
        return cls(torch.cat([high, (rows - high.float()).half()], 1) if split else high, split, unit)


def sum_rows(
    x: Operand, y: Operand, positive_logits: Tensor, left_out: LeftOut, temperature: float, constant_shift: bool,
    hits: bool,
    slack: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of x [M, D] against y [L, D]: loss, margin and log of the sum of all, [M]; and hits [M] bool, if wanted.

    The positives' logits come apart, [M] or, repeating, a divisor of it. A hit exceeds all others by `slack` of itself.
    """
    m, count, device = len(x.rows), len(y.rows), x.rows.device
    a_split = columns_a_split(m, count, device, 128, _GRANULE)
    splits = triton.cdiv(count, a_split)
    sums = torch.empty(splits, m, dtype=torch.float32, device=device)
    highest = torch.empty_like(sums) if hits else sums
    with on(device):
        _sum_rows[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), splits)](
            x.rows, y.rows, *_pointers(left_out, sums), sums, highest, m, count, a_split,
            left_out.start, left_out.half, *_scale(x, y, temperature), bucket(m), bucket(count),
            KIND=left_out.kind, CONSTANT_SHIFT=constant_shift, HITS=hits, **_shape(x),
        )  # fmt: skip
        loss, margin, log_sums = torch.empty(3, m, dtype=torch.float32, device=device)
        found = torch.empty(m if hits else 0, dtype=torch.bool, device=device)
        _finish_rows[(triton.cdiv(m, 128),)](
            sums, highest, positive_logits, loss, margin, log_sums, found.view(torch.int8), m, len(positive_logits),
            splits, slack, HITS=hits, BLOCK=128,
        )  # fmt: skip
    return loss, margin, log_sums, found if hits else None


def pull(
    x: Operand, y: Operand, log_sums: Tensor, weights: Tensor | None, left_out: LeftOut, temperature: float,
    constant_shift: bool,
) -> Tensor:  # fmt: skip
    """[splits, M, padded D] float32; the sum over the first is what x is pulled by (see `_pull`).

    In units of `y.unit`; weights [M] or [L] are of at most 1.
    """
    m, count, device = len(x.rows), len(y.rows), x.rows.device
    a_split = columns_a_split(m, count, device, 128, _GRANULE)
    splits = triton.cdiv(count, a_split)
    shape = _shape(x)
    pulled = torch.empty(splits, m, shape["D"], dtype=torch.float32, device=device)
    with on(device):
        _pull[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), splits, shape["D"] // shape["BLOCK_D"])](
            x.rows, y.rows, *_pointers(left_out, log_sums), log_sums, log_sums if weights is None else weights, pulled,
            m, count, a_split, left_out.start, left_out.half, *_scale(x, y, temperature),
            bucket(m), bucket(count), KIND=left_out.kind, CONSTANT_SHIFT=constant_shift, **shape,
        )  # fmt: skip
    return pulled


def _scale(x: Operand, y: Operand, temperature: float) -> tuple[float, Tensor]:
    """What a product of x and y is multiplied by to be a logit in base 2: on the host, and on the device."""
    unit = x.unit * y.unit
    return LOG2_E / temperature, unit if isinstance(unit, Tensor) else x.rows


def _pointers(left_out: LeftOut, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (
        unused if left_out.positive is None else left_out.positive,
        unused if left_out.exclude is None else left_out.exclude,
    )


def _shape(x: Operand) -> dict[str, Any]:
    scaled = isinstance(x.unit, Tensor)
    return {"D": x.width, "BLOCK_D": block_width(x.width, x.split), "SPLIT": x.split, "SCALED": scaled}


def compile_cases() -> list[CompileCase]:
    sizes = ("x_rows", "y_rows", "start", "half", "rows_bucket", "columns_bucket")
    floats = ("sums", "highest", "log_sums", "weights", "pulled", "unit")
    cases = []

    def add(name: str, kernel: Any, dtype: str, kind: int, d: int, split: bool, **constants: Any) -> None:
        types = dict.fromkeys(("x", "y"), f"*{dtype}") | dict.fromkeys(floats, "*fp32") | {"scale": "fp32"}
        types |= dict.fromkeys(("positive", "exclude"), "*i64" if kind else "*fp32")
        types |= dict.fromkeys((*sizes, "columns_a_split"), "i32")
        constants |= {"KIND": kind, "CONSTANT_SHIFT": kind == SYMMETRIC, "D": d, "SPLIT": split}
        constants |= {"BLOCK_D": block_width(d, split), "SCALED": split and kind != SYMMETRIC}
        title = f"{name}, D={d}, {dtype}{' split' if split else ''}"
        fits = _forward_fits if kernel is _sum_rows else _backward_fits
        cases.append(CompileCase(title, kernel, types, constants, fits=fits, odd=sizes))

    for d, split in ((128, False), (256, False), (1024, False), (128, True)):
        add("ntxent forward", _sum_rows, "fp16", SYMMETRIC, d, split, HITS=True)
        add("ntxent backward", _pull, "fp16", SYMMETRIC, d, split)
    add("contrastive forward", _sum_rows, "bf16", OF_ROWS, 128, False, HITS=True)
    add("contrastive backward of rows", _pull, "bf16", OF_ROWS, 128, False)
    add("contrastive backward of columns", _pull, "bf16", OF_COLUMNS, 128, False)
    return cases
