"""`photometric` on a CPU: one sample at a time, compiled by numba, in strips of rows that stay in the first cache.

A sample becomes three float32 planes [H * S], each row with a margin on both sides for what the blur mirrors. Margins
are computed along, so that a strip is one long loop without branches, of which LLVM makes vector instructions. Two
sweeps over the strips do what is pointwise and the blur along the rows, since contrast wants the mean of what comes
before it; a third blurs along the columns and stores.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_STRIP = 2048  # numbers of one plane: with three planes and the rows that a blur reaches, 32 KB or so


def render(crops: Tensor, packed: Tensor, affine: Tensor, out: Tensor) -> None:
    """Fills `out` [B, H, W, 3], float32, bfloat16 or float16.

    Args:
        crops: [B, H, W, 3] uint8, contiguous as all others.
        packed: [B, 15] float32, of `kernels.photometric.pack`.
        affine: [3, 2] float32: what each channel is multiplied with, and what is added then.
    """
    bits = out.view(torch.int32 if out.dtype == torch.float32 else torch.int16).flatten(2).numpy()
    none = np.empty((0, 0, 0), np.uint32)
    wide, narrow = (
        (bits.view(np.uint32), none.astype(np.uint16)) if bits.itemsize == 4 else (none, bits.view(np.uint16))
    )
    half = out.dtype == torch.float16
    margin = int(packed[:, 14].max())
    inputs = (crops.flatten(2).numpy(), packed.numpy(), affine.numpy())
    arguments: tuple[Any, ...] = (*inputs, margin, half, wide, narrow)
    threads = min(torch.get_num_threads(), len(crops))
    if threads == 1:
        _samples(*arguments, 0, len(crops))
        return
    # Parts of unequal cost, hence more than threads. Python's threads: of numba's own, the layer that is always there
    # ends the process when two threads use it at once.
    parts = min(8 * threads, len(crops))
    bounds = [len(crops) * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(_samples, *arguments, *ends) for ends in pairwise(bounds)]:
            job.result()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    # Reassociation lets a sum run in vector registers, contraction makes one instruction of a product and a sum.
    relaxed = {"reassoc", "contract", "nsz", "nnan", "ninf"}
    options |= {"nogil": True, "error_model": "numpy", "fastmath": relaxed}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return numba.njit(**options)(function)

    return decorate


# ---- in numba's dialect: the parts, over rows or numbers [first, last) of one sample ----------------------

_part = _compiled(no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_part
def _load(source: Any, flip: bool, planes: Any, start: int, stride: int, first: int, last: int) -> None:
    """source [H, 3 * W] uint8 -> planes [3, :] in [0, 1], pixel (y, x) at start + y * stride + x."""
    width = source.shape[1] // 3
    unit = np.float32(1 / 255)
    for y in range(first, last):
        pixels, at = source[y], start + y * stride
        red, green, blue = planes[0, at : at + width], planes[1, at : at + width], planes[2, at : at + width]
        if flip:
            for x in range(width):
                mirrored = np.uintp(3 * (width - 1 - x))  # unsigned: no check for negative indices
                red[x] = np.float32(pixels[mirrored]) * unit
                green[x] = np.float32(pixels[mirrored + np.uintp(1)]) * unit
                blue[x] = np.float32(pixels[mirrored + np.uintp(2)]) * unit
        else:
            for x in range(width):
                red[x] = np.float32(pixels[3 * x]) * unit
                green[x] = np.float32(pixels[3 * x + 1]) * unit
                blue[x] = np.float32(pixels[3 * x + 2]) * unit
        for c in range(3):
            # What the sample before left here may be denormal, which is slow.
            for x in range(at + width, at + stride):
                planes[c, x] = 0


@_part
def _gray_sum(planes: Any, start: int, stride: int, first: int, last: int, width: int) -> Any:
    """Row by row, so that a mean does not depend on how strips are cut: on what else is in the batch."""
    total = np.float64(0)
    for y in range(first, last):
        i, j = start + y * stride, start + y * stride + width
        red, green, blue = planes[0, i:j], planes[1, i:j], planes[2, i:j]
        row = np.float32(0)
        for x in range(width):
            row += np.float32(0.2989) * red[x] + np.float32(0.587) * green[x] + np.float32(0.114) * blue[x]
        total += row
    return total


@_part
def _scale(planes: Any, first: int, last: int, factor: float, offset: float) -> None:
    for c in range(3):
        plane = planes[c, first:last]
        for x in range(len(plane)):
            plane[x] = min(max(plane[x] * factor + offset, np.float32(0)), np.float32(1))


@_part
def _saturation(planes: Any, first: int, last: int, factor: float) -> None:
    zero, one = np.float32(0), np.float32(1)
    red, green, blue = planes[0, first:last], planes[1, first:last], planes[2, first:last]
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        gray = np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b
        rest = (one - factor) * gray
        red[x] = min(max(r * factor + rest, zero), one)
        green[x] = min(max(g * factor + rest, zero), one)
        blue[x] = min(max(b * factor + rest, zero), one)


@_part
def _hue(planes: Any, first: int, last: int, factor: float) -> None:
    """With m and M the smallest and largest channel and h the hue in sixths of a turn, red is
    m + (M - m) * clamp(|h - 3| - 1, 0, 1); green and blue are M - (M - m) * the same about 2 and 4."""
    zero, one, six = np.float32(0), np.float32(1), np.float32(6)
    red, green, blue = planes[0, first:last], planes[1, first:last], planes[2, first:last]
    turn = factor * six
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        ahead = g - b if r == high else (b - r if g == high else r - g)
        centre = zero if r == high else (np.float32(2) if g == high else np.float32(4))
        # Where the divisor's floor acts, the difference above it is zero.
        h = ahead / max(chroma, np.float32(1e-12)) + centre + turn
        h = h + six if h < zero else h
        h = h - six if h >= six else h
        red[x] = low + chroma * min(max(abs(h - np.float32(3)) - one, zero), one)
        green[x] = high - chroma * min(max(abs(h - np.float32(2)) - one, zero), one)
        blue[x] = high - chroma * min(max(abs(h - np.float32(4)) - one, zero), one)


@_part
def _adjust(operation: float, factor: float, mean: float, planes: Any, first: int, last: int) -> None:
    if operation == 0:
        _scale(planes, first, last, factor, np.float32(0))
    elif operation == 1:
        _scale(planes, first, last, factor, (np.float32(1) - factor) * mean)
    elif operation == 2:
        _saturation(planes, first, last, factor)
    elif operation == 3:
        _hue(planes, first, last, factor)


@_part
def _weights(sigma: float, radius: int, taps: Any) -> None:
    """taps [radius + 3 or more]: a Gaussian's from the middle outwards, then zeros."""
    total = 0.0
    taps[:] = 0
    for k in range(radius + 1):
        weight = np.exp(-0.5 * (k / sigma) ** 2)
        total += weight if k == 0 else 2 * weight
        taps[k] = weight
    for k in range(radius + 1):
        taps[k] /= total


@_part
def _fold(targets: Any, first: int, last: int, sources: Any, at: int, step: int, taps: Any, radius: int) -> None:
    """target[first + x] = sum over k of taps[|k|] * source[at + x + k * step], for each plane."""
    size = last - first
    for c in range(3):
        target, middle, weight = targets[c, first:last], sources[c, at : at + size], taps[0]
        for x in range(size):
            target[x] = weight * middle[x]
        for k in range(1, radius + 1, 3):  # three distances in each run through the target
            h, i, j = step * k, step * min(k + 1, radius), step * min(k + 2, radius)
            a, b = sources[c, at - h : at - h + size], sources[c, at + h : at + h + size]
            d, e = sources[c, at - i : at - i + size], sources[c, at + i : at + i + size]
            f, g = sources[c, at - j : at - j + size], sources[c, at + j : at + j + size]
            u, v, w = taps[k], taps[k + 1], taps[k + 2]
            for x in range(size):
                target[x] += u * (a[x] + b[x]) + v * (d[x] + e[x]) + w * (f[x] + g[x])


@_part
def _mirror_columns(planes: Any, start: int, stride: int, first: int, last: int, width: int, radius: int) -> None:
    for c in range(3):
        for y in range(first, last):
            left = start + y * stride
            right = left + width - 1
            for k in range(1, radius + 1):
                planes[c, left - k] = planes[c, min(left + k, right)]
                planes[c, right + k] = planes[c, max(right - k, left)]


@_part
def _mirror_rows(planes: Any, start: int, stride: int, height: int, radius: int) -> None:
    for c in range(3):
        for k in range(1, radius + 1):
            above, below = start + min(k, height - 1) * stride, start + max(height - 1 - k, 0) * stride
            top, bottom = start - k * stride, start + (height - 1 + k) * stride
            for x in range(stride):
                planes[c, np.uintp(top + x)] = planes[c, np.uintp(above + x)]
                planes[c, np.uintp(bottom + x)] = planes[c, np.uintp(below + x)]


@_part
def _finish(planes: Any, first: int, last: int, threshold: float, affine: Any) -> None:
    for c in range(3):
        plane, scale, shift = planes[c, first:last], affine[c, 0], affine[c, 1]
        for x in range(len(plane)):
            value = plane[x]
            plane[x] = (np.float32(1) - value if value >= threshold else value) * scale + shift


@_part
def _to_bfloat16(bits: Any, first: int, last: int) -> None:
    """Each number becomes the bits of the nearest bfloat16, ties to even."""
    for c in range(3):
        plane = bits[c, first:last]
        for x in range(len(plane)):
            word = plane[x]
            plane[x] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@_part
def _to_float16(numbers: Any, bits: Any, first: int, last: int) -> None:
    """Each number becomes the bits of the nearest float16, ties to even. Below 2^-14 those count steps of 2^-24."""
    for c in range(3):
        row, plane = numbers[c, first:last], bits[c, first:last]
        for x in range(len(plane)):
            word = plane[x]
            size = word & np.uint32(0x7FFFFFFF)
            large = (size - np.uint32(0x37FFF001) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
            small = np.uint32(np.int32(np.rint(min(abs(row[x]), np.float32(1)) * np.float32(2**24))))
            half = small if size < np.uint32(0x38800000) else min(large, np.uint32(0x7C00))
            plane[x] = half | ((word >> np.uint32(16)) & np.uint32(0x8000))


@_part
def _interleave(target: Any, bits: Any, start: int, stride: int, first: int, last: int) -> None:
    """bits [3, :], row `first` from `start` on -> rows of target [H, 3 * W]."""
    width = target.shape[1] // 3
    for y in range(first, last):
        row, at = target[y], start + (y - first) * stride
        red, green, blue = bits[0, at : at + width], bits[1, at : at + width], bits[2, at : at + width]
        for x in range(width):
            row[3 * x] = red[x]
            row[3 * x + 1] = green[x]
            row[3 * x + 2] = blue[x]


# ---- all of it --------------------------------------------------------------------------------------------


@_compiled()
def _samples(
    crops: Any, packed: Any, affine: Any, margin: int, half: bool, wide: Any, narrow: Any, begin: int, end: int
) -> None:
    height, width = crops.shape[1], crops.shape[2] // 3
    stride = (width + 2 * margin + 15) // 16 * 16
    rows = max(_STRIP // stride, 1)
    # Pixel (y, x) lies at 2 * margin + y * stride + x: one margin for the first row's left, one that may be read.
    planes = np.zeros((3, 2 * margin + height * stride), np.float32)
    blurred = np.zeros((3, (height + 2 * margin) * stride if margin else 0), np.float32)
    strip = np.zeros((3, margin + rows * stride if margin else 0), np.float32)
    taps = np.zeros(margin + 3, np.float32)
    for b in range(begin, end):
        flip, before, radius = packed[b, 0] > 0, int(packed[b, 1]), int(packed[b, 14])
        for c in range(3):
            for x in range(2 * margin):
                planes[c, x] = 0
        total = np.float64(0)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            i, j = margin + first * stride, margin + last * stride
            _load(crops[b], flip, planes, 2 * margin, stride, first, last)
            for step in range(before):
                _adjust(packed[b, 2 + step], packed[b, 7 + step], np.float32(0), planes, i, j)
            if before < 5:
                total += _gray_sum(planes, 2 * margin, stride, first, last, width)
        mean = np.float32(total / (height * width))
        if radius:
            _weights(packed[b, 13], radius, taps)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            i, j = margin + first * stride, margin + last * stride
            for step in range(before, 5):
                _adjust(packed[b, 2 + step], packed[b, 7 + step], mean, planes, i, j)
            if radius:
                _mirror_columns(planes, 2 * margin, stride, first, last, width, radius)
                at = margin * stride
                one = np.int64(1)  # of a literal numba would make another version
                _fold(blurred, at + first * stride, at + last * stride, planes, i, one, taps, radius)
        if radius:
            _mirror_rows(blurred, margin * stride, stride, height, radius)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            result, i, j = planes, margin + first * stride, margin + last * stride
            if radius:
                result, i, j = strip, margin, margin + (last - first) * stride
                _fold(strip, i, j, blurred, (margin + first) * stride, stride, taps, radius)
            _finish(result, i, j, packed[b, 12], affine)
            bits = result.view(np.uint32)
            if len(wide):
                _interleave(wide[b], bits, i + margin, stride, first, last)
            else:
                if half:
                    _to_float16(result, bits, i, j)
                else:
                    _to_bfloat16(bits, i, j)
                _interleave(narrow[b], bits, i + margin, stride, first, last)
