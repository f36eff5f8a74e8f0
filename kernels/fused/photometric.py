"""`photometric` on a GPU: one pass over the uint8 pixels for contrast's means, one that does all that is pointwise
and, for blurred samples, one along the rows and one along the columns.

Every program belongs to one sample and reads what to do from its row of the packed parameters, so that an operation
costs only the samples that ask for it. Unblurred samples are finished by the pointwise pass; blurred ones wait as
float32 planes in a workspace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.products import rounded
from kernels.fused.tuning import CompileCase, bucket, tuned
from kernels.transfer import to_device

_WORKSPACE_BYTES = 512 * 2**20  # for the blur; with more samples than fit, the next ones use it again
_PARTS = 64  # at most so many partial sums of gray a sample
_PART_PIXELS = 512  # that a program sums up at a time


# ---- the operations on pixels ----------------------------------------------------------------------------


@triton.jit
def _load(crop, flip, pixel, inside, width):
    """Three channels in [0, 1]; zeros outside."""
    if flip > 0:
        row = pixel // width
        pixel = (2 * row + 1) * width - 1 - pixel
    red = tl.load(crop + 3 * pixel, mask=inside, other=0).to(tl.float32) * (1.0 / 255)
    green = tl.load(crop + 3 * pixel + 1, mask=inside, other=0).to(tl.float32) * (1.0 / 255)
    blue = tl.load(crop + 3 * pixel + 2, mask=inside, other=0).to(tl.float32) * (1.0 / 255)
    return red, green, blue


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _adjust(red, green, blue, operation, factor, mean):
    """0 brightness, 1 contrast, 2 saturation: towards black, the mean, gray. 3 hue. 4 nothing."""
    if operation < 3:
        other = tl.zeros_like(red)
        if operation == 1:
            other += mean
        if operation == 2:
            other = _gray(red, green, blue)
        rest = (1 - factor) * other
        red = _unit(red * factor + rest)
        green = _unit(green * factor + rest)
        blue = _unit(blue * factor + rest)
    if operation == 3:
        # With m and M the smallest and largest channel and h the hue in sixths of a turn, red is
        # m + (M - m) * clamp(|h - 3| - 1, 0, 1); green and blue are M - (M - m) * the same about 2 and 4.
        high = tl.maximum(tl.maximum(red, green), blue)
        low = tl.minimum(tl.minimum(red, green), blue)
        chroma = high - low
        ahead = tl.where(red == high, green - blue, tl.where(green == high, blue - red, red - green))
        centre = tl.where(red == high, 0.0, tl.where(green == high, 2.0, 4.0))
        # Where the divisor's floor acts, the difference above it is zero.
        hue = ahead / tl.maximum(chroma, 1e-12) + centre + 6 * factor
        hue = tl.where(hue < 0, hue + 6, hue)
        hue = tl.where(hue >= 6, hue - 6, hue)
        red = low + chroma * _unit(tl.abs(hue - 3) - 1)
        green = high - chroma * _unit(tl.abs(hue - 2) - 1)
        blue = high - chroma * _unit(tl.abs(hue - 4) - 1)
    return red, green, blue


@triton.jit
def _store(target, at, inside, red, green, blue, threshold, r_scale, r_shift, g_scale, g_shift, b_scale, b_shift):
    """Solarises, normalises and writes pixels `at` of one sample [H * W, 3]."""
    red = tl.where(red >= threshold, 1 - red, red)
    green = tl.where(green >= threshold, 1 - green, green)
    blue = tl.where(blue >= threshold, 1 - blue, blue)
    kind: tl.constexpr = target.dtype.element_ty
    tl.store(target + 3 * at, rounded(red * r_scale + r_shift, kind), mask=inside)
    tl.store(target + 3 * at + 1, rounded(green * g_scale + g_shift, kind), mask=inside)
    tl.store(target + 3 * at + 2, rounded(blue * b_scale + b_shift, kind), mask=inside)


# ---- the passes; the large dimension of each grid is samples x tiles -------------------------------------


@triton.jit(do_not_specialize=["parts"])
def _gray_sums(crops, packed, sums, height, width, parts, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """sums [B, parts]: of gray, as contrast finds it; blocks of pixels are dealt out to the parts in turn."""
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    todo = packed + sample * COLUMNS
    before = tl.load(todo + 1).to(tl.int32)
    if before < 5:
        flip = tl.load(todo)
        crop = crops + sample.to(tl.int64) * (height * width * 3)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(part * BLOCK, height * width, parts * BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            red, green, blue = _load(crop, flip, pixel, pixel < height * width, width)
            for step in range(before):  # none makes anything of the zeros outside
                operation, factor = tl.load(todo + 2 + step), tl.load(todo + 7 + step)
                red, green, blue = _adjust(red, green, blue, operation, factor, 0.0)
            total += _gray(red, green, blue)
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@tuned(
    [
        triton.Config({"BLOCK": 512}, num_warps=4, num_stages=1),
        triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
    ],
    key=["size"],
)
@triton.jit(do_not_specialize=["parts", "size"])
def _pointwise(
    crops, packed, sums, planes, out, height, width, parts,
    r_scale, r_shift, g_scale, g_shift, b_scale, b_shift, size,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unblurred samples into out [B, H * W, 3]; blurred ones into their places in planes [., 3, H * W]."""
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK)
    sample = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    todo = packed + sample * COLUMNS
    before = tl.load(todo + 1).to(tl.int32)
    mean = 0.0
    if before < 5:
        part = tl.arange(0, PARTS)
        mean = tl.sum(tl.load(sums + sample * parts + part, mask=part < parts, other=0.0), 0) / pixels
    red, green, blue = _load(crops + sample.to(tl.int64) * (pixels * 3), tl.load(todo), pixel, inside, width)
    for step in range(5):
        operation, factor = tl.load(todo + 2 + step), tl.load(todo + 7 + step)
        red, green, blue = _adjust(red, green, blue, operation, factor, mean)
    if tl.load(todo + 14) > 0:
        plane = planes + tl.load(todo + 15).to(tl.int64) * (pixels * 3) + pixel
        tl.store(plane, red, mask=inside)
        tl.store(plane + pixels, green, mask=inside)
        tl.store(plane + 2 * pixels, blue, mask=inside)
    else:
        _store(
            out + sample.to(tl.int64) * (pixels * 3), pixel, inside, red, green, blue, tl.load(todo + 12),
            r_scale, r_shift, g_scale, g_shift, b_scale, b_shift,
        )  # fmt: skip


@triton.jit
def _tap(k, sigma):
    return tl.exp(-0.5 * (k / sigma) * (k / sigma))


@tuned(
    [
        triton.Config({"ROWS": 16, "WIDE": 64}, num_warps=4, num_stages=1),
        triton.Config({"ROWS": 8, "WIDE": 128}, num_warps=4, num_stages=1),
    ],
    key=["size"],
)
@triton.jit(do_not_specialize=["size"])
def _blur_rows(
    packed, planes, blurred, height, width, size, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """planes -> blurred [., 3 * H, W], each row along itself, mirrored at its ends."""
    tiles, across = tl.cdiv(3 * height, ROWS) * tl.cdiv(width, WIDE), tl.cdiv(width, WIDE)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    todo = packed + sample * COLUMNS
    radius = tl.load(todo + 14).to(tl.int32)
    if radius > 0:
        sigma = tl.load(todo + 13)
        y = (tile // across) * ROWS + tl.arange(0, ROWS)
        x = (tile % across) * WIDE + tl.arange(0, WIDE)
        inside = (y < 3 * height)[:, None] & (x < width)[None, :]
        first = tl.load(todo + 15).to(tl.int64) * (3 * height * width)
        row = planes + first + (tl.minimum(y, 3 * height - 1) * width)[:, None]
        last = width - 1
        x = tl.minimum(x, last)
        total = tl.load(row + x[None, :])
        weights = 1.0
        for k in range(1, radius + 1):
            weight = _tap(k, sigma)
            left = tl.minimum(tl.abs(x - k), last)
            right = tl.maximum(last - tl.abs(last - x - k), 0)
            total += weight * (tl.load(row + left[None, :]) + tl.load(row + right[None, :]))
            weights += 2 * weight
        target = blurred + first + (y * width)[:, None] + x[None, :]
        tl.store(target, total / weights, mask=inside)


@tuned(
    [
        triton.Config({"ROWS": 16, "WIDE": 32}, num_warps=4, num_stages=1),
        triton.Config({"ROWS": 32, "WIDE": 32}, num_warps=4, num_stages=1),
    ],
    key=["size"],
)
@triton.jit(do_not_specialize=["size"])
def _blur_columns(
    packed, planes, out, height, width, r_scale, r_shift, g_scale, g_shift, b_scale, b_shift, size,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """planes [., 3, H, W], blurred along the rows -> out [B, H, W, 3]."""
    tiles, across = tl.cdiv(height, ROWS) * tl.cdiv(width, WIDE), tl.cdiv(width, WIDE)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    todo = packed + sample * COLUMNS
    radius = tl.load(todo + 14).to(tl.int32)
    if radius > 0:
        sigma = tl.load(todo + 13)
        y = (tile // across) * ROWS + tl.arange(0, ROWS)
        x = (tile % across) * WIDE + tl.arange(0, WIDE)
        inside = (y < height)[:, None] & (x < width)[None, :]
        at = y[:, None] * width + x[None, :]
        pixels, last = height * width, height - 1
        y, x = tl.minimum(y, last), tl.minimum(x, width - 1)
        column = planes + tl.load(todo + 15).to(tl.int64) * (3 * pixels) + x[None, :]
        middle = column + y[:, None] * width
        red, green, blue = tl.load(middle), tl.load(middle + pixels), tl.load(middle + 2 * pixels)
        weights = 1.0
        for k in range(1, radius + 1):
            weight = _tap(k, sigma)
            above = column + (tl.minimum(tl.abs(y - k), last) * width)[:, None]
            below = column + (tl.maximum(last - tl.abs(last - y - k), 0) * width)[:, None]
            red += weight * (tl.load(above) + tl.load(below))
            green += weight * (tl.load(above + pixels) + tl.load(below + pixels))
            blue += weight * (tl.load(above + 2 * pixels) + tl.load(below + 2 * pixels))
            weights += 2 * weight
        target = out + sample.to(tl.int64) * (pixels * 3)
        _store(
            target, at, inside, red / weights, green / weights, blue / weights, tl.load(todo + 12),
            r_scale, r_shift, g_scale, g_shift, b_scale, b_shift,
        )  # fmt: skip


# ---- launching -------------------------------------------------------------------------------------------


def render(crops: Tensor, packed: Tensor, affine: Tensor, out: Tensor) -> None:
    """Fills `out` [B, H, W, 3], float32, bfloat16 or float16. Nothing waits for the device.

    Args:
        crops: [B, H, W, 3] uint8, contiguous as all others.
        packed: [B, 15] float32 of `kernels.photometric.pack`. On the CPU: what no sample asks for is not launched.
        affine: [3, 2] float32 on the CPU: what each channel is multiplied with, and what is added then.
    """
    batch, height, width = crops.shape[:3]
    pixels, known = height * width, packed.device.type == "cpu"
    contrast = not known or bool((packed[:, 1] < 5).any())
    blurs = packed[:, 14] > 0
    blurred = int(blurs.sum()) if known else batch
    room = max(_WORKSPACE_BYTES // (2 * 3 * 4 * pixels), 1)
    chunk = batch if blurred <= room else room
    places = torch.cat([part.cumsum(0) - 1 for part in blurs.split(chunk)])  # in the workspace
    packed = torch.cat([packed, places[:, None]], 1)
    packed = to_device(packed, crops.device)

    parts, size = min(triton.cdiv(pixels, _PART_PIXELS), _PARTS), bucket(pixels)
    sums = crops.new_empty((batch if contrast else 1, parts), dtype=torch.float32)
    planes, lines = crops.new_empty((2, min(blurred, chunk), 3, height, width), dtype=torch.float32)
    r_scale, r_shift, g_scale, g_shift, b_scale, b_shift = affine.flatten().tolist()
    normalise = (r_scale, r_shift, g_scale, g_shift, b_scale, b_shift)
    columns = packed.shape[1]

    def tiles(high: int, count: int) -> object:
        return lambda meta: (count * triton.cdiv(high, meta["ROWS"]) * triton.cdiv(width, meta["WIDE"]),)

    with torch.cuda.device_of(crops):
        for first in range(0, batch, chunk):
            part = slice(first, min(first + chunk, batch))
            count, source, target, todo = part.stop - first, crops[part], out[part], packed[part]
            if contrast:
                grid = (count * parts,)
                _gray_sums[grid](
                    source, todo, sums, height, width, parts,
                    COLUMNS=columns, BLOCK=_PART_PIXELS, num_warps=4, num_stages=1,
                )  # fmt: skip
            _pointwise[lambda meta, count=count: (count * triton.cdiv(pixels, meta["BLOCK"]),)](
                source, todo, sums, planes, target, height, width, parts, *normalise, size,
                COLUMNS=columns, PARTS=_PARTS,
            )  # fmt: skip
            if blurred:
                _blur_rows[tiles(3 * height, count)](todo, planes, lines, height, width, size, COLUMNS=columns)
                _blur_columns[tiles(height, count)](
                    todo, lines, target, height, width, *normalise, size, COLUMNS=columns
                )


def compile_cases() -> list[CompileCase]:
    types = {
        "crops": "*u8", "packed": "*fp32", "sums": "*fp32", "planes": "*fp32", "blurred": "*fp32", "out": "*bf16",
        "height": "i32", "width": "i32", "parts": "i32", "size": "i32",
    } | {f"{c}_{what}": "fp32" for c in "rgb" for what in ("scale", "shift")}  # fmt: skip
    odd = ("height", "width", "parts", "size", "crops", "out")
    wide = types | {"out": "*fp32"}
    sums, columns = {"COLUMNS": 16, "BLOCK": _PART_PIXELS}, {"COLUMNS": 16}
    return [
        CompileCase("photometric gray sums", _gray_sums, types, sums, [triton.Config({}, num_stages=1)], odd=odd),
        CompileCase("photometric pointwise, bf16", _pointwise, types, columns | {"PARTS": _PARTS}, odd=odd),
        CompileCase("photometric pointwise, float32", _pointwise, wide, columns | {"PARTS": _PARTS}, odd=odd),
        CompileCase("photometric blur along rows", _blur_rows, types, columns, odd=odd),
        CompileCase("photometric blur along columns, bf16", _blur_columns, types, columns, odd=odd),
        CompileCase("photometric blur along columns, float32", _blur_columns, wide, columns, odd=odd),
    ]
