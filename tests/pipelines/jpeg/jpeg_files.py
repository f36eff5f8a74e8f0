"""JPEGs of every kind that the decoder's tests need, made with Pillow from one real photo."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def photo() -> np.ndarray:
    """[427, 640, 3] uint8"""
    return load_sample_images().images[0]


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"quality": 85} | options))
    return stream.getvalue()


def kinds(height: int, width: int) -> dict[str, bytes]:
    """One small image, from the middle of the photo, in every encoding that is to be decoded."""
    pixels = np.ascontiguousarray(photo()[150 : 150 + height, 200 : 200 + width])
    return {
        "444": encode(pixels, subsampling="4:4:4"),
        "422": encode(pixels, subsampling="4:2:2"),
        "420": encode(pixels, subsampling="4:2:0"),
        "440": resampled(pixels, "4:2:2", 0x12),
        "411": resampled(pixels, "4:2:0", 0x41),
        "gray": encode(pixels[..., 1]),
        "rgb": encode(pixels, keep_rgb=True),
        "progressive": encode(pixels, progressive=True),
        "progressive 444": encode(pixels, progressive=True, subsampling="4:4:4"),
        "restarts": encode(pixels, restart_marker_blocks=3),
        "restarts 444": encode(pixels, restart_marker_rows=1, subsampling="4:4:4"),
    }


def resampled(pixels: np.ndarray, subsampling: str, factors: int) -> bytes:
    """A legal JPEG of sampling factors that Pillow does not write. Its blocks are as many to a unit, but differently
    arranged, so the picture is shuffled. Its size is odd in both axes where there is room for that."""
    data = bytearray(encode(pixels, subsampling=subsampling))
    frame = frame_of(data)
    old, data[frame + 11] = data[frame + 11], factors
    for at, shift in ((frame + 5, 0), (frame + 7, 4)):  # height, width
        units = -(-int.from_bytes(data[at : at + 2]) // (8 * (old >> shift & 15)))
        data[at : at + 2] = (units * 8 * (factors >> shift & 15) - 3).to_bytes(2)
    return bytes(data)


def frame_of(data: bytes | bytearray) -> int:
    """Where the SOF0 marker is."""
    return bytes(data).index(b"\xff\xc0\x00\x11\x08")


def with_size(data: bytes, height: int, width: int) -> bytes:
    at = frame_of(data) + 5
    return data[:at] + height.to_bytes(2) + width.to_bytes(2) + data[at + 4 :]


def pillow(data: bytes, denominator: int = 1) -> np.ndarray:
    """Pillow's decode, by libjpeg at 1 / denominator of the size."""
    with Image.open(io.BytesIO(data)) as image:
        if denominator > 1:
            image.draft(image.mode, (image.width // denominator, image.height // denominator))
        return np.array(image.convert("RGB"))


def triangle(image: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    """The antialiased crop [size, size, 3] in float64, not rounded, by one matrix an axis; boxes may be fractional."""
    matrices = []
    for start, length, extent in zip(box[:2], box[2:], image.shape[:2], strict=True):
        pixels = np.arange(np.floor(start) - 1, np.ceil(start + length) + 1)
        position = pixels + 0.5 - start
        scale = length / size
        distance = np.abs(position - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1.0)
        weights = np.maximum(1 - distance, 0) * ((position >= 0) & (position <= length))
        weights /= weights.sum(1, keepdims=True)  # with the pixels outside of the image, which are black
        inside = (pixels >= 0) & (pixels < extent)
        matrix = np.zeros((size, extent))
        matrix[:, pixels[inside].astype(int)] = weights[:, inside]
        matrices.append(matrix)
    return np.einsum("yh,hwc,xw->yxc", matrices[0], image.astype(np.float64), matrices[1], optimize=True)
