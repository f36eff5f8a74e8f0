"""Decodes a JPEG once, only where its crops lie, and cuts and resizes them: our own C on top of libjpeg-turbo.

The C (`decoder.c`, `resize.h`) is compiled for this machine at first use, in about a second, and kept in the
user's cache folder. Where there is no compiler or no jpeglib.h, `jpeg_decoder()` is None and
`why_no_jpeg_decoder()` says what is missing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from pipelines.jpeg.c_library import CannotCompileError, c_library
from pipelines.stored.encoded import MOST_PIXELS

Encoded = bytes | bytearray | memoryview | np.ndarray

_MESSAGE_BYTES = 256


class JpegError(ValueError):
    """An image that cannot be decoded here.

    Attributes:
        position: which of the images given; 0 where only one was.
        reason: why, in a line.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"image {position}: {reason}")
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple[type[JpegError], tuple[int, str]]:
        return type(self), (self.position, self.reason)  # exceptions of worker processes are pickled


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What a JPEG says of itself.

    Attributes:
        height, width: of the pixels as they are stored.
        orientation: 1 to 8 as EXIF (or else XMP) has it, 1 where neither says anything valid: the view is upright.
        channels: 1 for gray, 3 for colours, 4 for CMYK.
        supported: `JpegDecoder` decodes it; not so CMYK, lossless, arithmetic-coded and 12-bit files.
        progressive: pixels are spread over several passes: no time is saved by decoding a region.
    """

    height: int
    width: int
    orientation: int
    channels: int
    supported: bool
    progressive: bool


class JpegDecoder:
    """The compiled library. Every method may be called by any number of threads at once; see `jpeg_decoder`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, wide, narrow = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._header = library.twinstream_jpeg_header
        self._header.argtypes = [pointer, wide, pointer, ctypes.c_char_p]
        self._decode = library.twinstream_jpeg_decode
        self._decode.argtypes = [pointer, wide, wide, wide, wide, pointer, ctypes.c_char_p]
        self._crops = library.twinstream_jpeg_crops
        self._crops.argtypes = [pointer] * 6 + [wide] * 3 + [narrow, wide, pointer, wide, wide, ctypes.c_char_p]
        self._crops.restype = wide

    def header(self, data: Encoded) -> JpegHeader:
        """Sizes, orientation and kind of one encoded image, from its first bytes, in microseconds.

        Raises:
            JpegError: it is no JPEG, or it ends before its pixels begin.
        """
        encoded = _encoded(data, 0)
        info, message = (ctypes.c_int32 * 6)(), ctypes.create_string_buffer(_MESSAGE_BYTES)
        if not self._header(_address(encoded), encoded.size, info, message):
            raise JpegError(0, _text(message))
        height, width, channels, supported, progressive, orientation = info
        return JpegHeader(height, width, orientation, channels, bool(supported), bool(progressive))

    def decode(self, data: Encoded) -> np.ndarray:
        """The whole image as it is stored: uint8 [H, W, 3], RGB, the pixels of torchvision's and Pillow's decoders.

        Raises:
            JpegError: it is damaged, not `supported`, or has more than `MOST_PIXELS` pixels.
        """
        encoded, header = _encoded(data, 0), self.header(data)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if header.height * header.width > MOST_PIXELS:
            raise JpegError(0, f"{header.height} x {header.width} pixels, expected at most {MOST_PIXELS}")
        out = np.empty((header.height, header.width, 3), np.uint8)
        address, size = _address(encoded), encoded.size
        if not self._decode(address, size, header.height, header.width, MOST_PIXELS, _address(out), message):
            raise JpegError(0, _text(message))
        return out

    def decode_crops(
        self,
        images: Sequence[Encoded | None],
        boxes: np.ndarray,
        out: np.ndarray,
        *,
        sizes: np.ndarray,
        scaled: bool = True,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """Fills out[:, begin:end] with V crops of each image, which is decoded once; Python's lock is released.

        The filter is that of `kernels.crop_resize`. Damage below the lowest row that a crop needs is not seen.

        Args:
            images: N of them, in memory that stays as it is: a JPEG (bytes, or uint8 in one dimension, such as a
                slice of a memory map) or pixels, uint8 [H, W, 3]. Those outside of begin to end are not touched.
            boxes: [V, N, 4] int64 (top, left, height, width) in pixels of the image as stored; may reach outside:
                black there.
            out: [V, N, S, S, 3] uint8.
            sizes: [N, 2] integers, (height, width) of each image as stored.
            scaled: let libjpeg decode at 1/2, 1/4 or 1/8 an image of which every crop is shrunk at least as much:
                faster, but its own averages take the place of part of the filter.
            begin, end: which images; None: to the last.

        Raises:
            JpegError: the first image that cannot be decoded, or that is not of the size given; those before it
                are done, it and those after it hold nothing of use.
            ValueError: arguments of other shapes or dtypes, or an empty box.
        """
        end = len(images) if end is None else end
        _check(boxes, out, sizes, len(images), begin, end)
        addresses, lengths = np.zeros(len(images), np.uint64), np.zeros(len(images), np.uint64)
        raw = np.zeros(len(images), np.uint8)
        kept = []  # arrays whose addresses are in use
        for i in range(begin, end):
            image = images[i]
            if isinstance(image, np.ndarray) and image.ndim == 3:
                array, raw[i] = _pixels(image, i), 1
                if array.shape[:2] != tuple(sizes[i]):
                    given = " x ".join(map(str, sizes[i]))
                    raise JpegError(i, f"it has {image.shape[0]} x {image.shape[1]} pixels, expected {given}")
            else:
                array = _encoded(image, i)
            kept.append(array)
            addresses[i], lengths[i] = _address(array), array.size
        heights, widths = (np.ascontiguousarray(sizes[:, axis], np.int32) for axis in (0, 1))
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        arrays = [_address(a) for a in (addresses, lengths, raw, heights, widths, boxes)]
        shape = (len(boxes), len(images), out.shape[2])
        done = self._crops(*arrays, *shape, scaled, MOST_PIXELS, _address(out), begin, end, message)
        if done < end:
            raise JpegError(done, _text(message))


def jpeg_decoder() -> JpegDecoder | None:
    """The decoder, compiled at the first call on this machine; None where it cannot be had."""
    return _found()[0]


def why_no_jpeg_decoder() -> str | None:
    """What `jpeg_decoder` lacks, as part of a sentence; None where it lacks nothing."""
    return _found()[1]


# ---- arguments -----------------------------------------------------------------------------------------


def _check(boxes: np.ndarray, out: np.ndarray, sizes: np.ndarray, count: int, begin: int, end: int) -> None:
    if out.ndim != 5 or out.dtype != np.uint8 or out.shape[2] != out.shape[3] or out.shape[4] != 3 or not out.size:
        raise ValueError(f"out: expected [V, N, S, S, 3] uint8, got {list(out.shape)} {out.dtype}")
    if boxes.shape != (len(out), count, 4) or boxes.dtype != np.int64:
        raise ValueError(f"boxes: expected [{len(out)}, {count}, 4] int64, got {list(boxes.shape)} {boxes.dtype}")
    if out.shape[1] != count or sizes.shape != (count, 2) or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(
            f"{count} images: expected out [V, {count}, S, S, 3] and sizes [{count}, 2] integers, "
            f"got {list(out.shape)} and {list(sizes.shape)} {sizes.dtype}"
        )
    if not (out.flags.c_contiguous and out.flags.writeable and boxes.flags.c_contiguous):
        raise ValueError("out and boxes: expected contiguous arrays, out writeable; pass np.ascontiguousarray(…)")
    if not 0 <= begin <= end <= count:
        raise ValueError(f"begin and end: expected 0 <= begin <= end <= {count}, got {begin} and {end}")
    chosen = boxes[:, begin:end]
    if chosen.size and (chosen[..., 2:].min() < 1 or chosen.max() > 2**30 or chosen.min() < -(2**30)):
        raise ValueError(
            "boxes: expected (top, left, height, width) with heights and widths from 1, nothing beyond 2^30"
        )


def _encoded(data: Encoded | None, position: int) -> np.ndarray:
    """The bytes as a flat array, without a copy."""
    if isinstance(data, np.ndarray):
        if data.ndim != 1 or data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(
                f"image {position}: expected a JPEG as contiguous uint8 [bytes], got {list(data.shape)} {data.dtype}"
            )
        return data
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"image {position}: expected bytes or a uint8 array, got {type(data).__name__}")
    return np.frombuffer(data, np.uint8)


def _pixels(image: np.ndarray, position: int) -> np.ndarray:
    if image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image {position}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return np.ascontiguousarray(image)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _text(message: ctypes.Array[ctypes.c_char]) -> str:
    return message.value.decode(errors="replace")


# ---- finding the library -------------------------------------------------------------------------------

_Found = tuple[JpegDecoder | None, str | None]
_lock = Lock()
_known: _Found | None = None


def _found() -> _Found:
    global _known
    with _lock:  # one compilation for all threads
        if _known is None:
            _known = _find()
        return _known


def _find() -> _Found:
    folder = Path(__file__).parent
    try:
        library = c_library(
            folder / "decoder.c", depends=[folder / "resize.h"], libraries=["jpeg", "m"], works=_why_not
        )
    except CannotCompileError as error:
        reason = str(error)
        if "jpeglib.h" in reason or "-ljpeg" in reason or "library 'jpeg'" in reason:
            reason = "libjpeg-turbo's header jpeglib.h or library is missing (apt-get install libjpeg-dev, or its like)"
        return None, reason
    return JpegDecoder(library), None


def _why_not(library: ctypes.CDLL) -> str | None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    return None if library.twinstream_jpeg_probe(message) else f"libjpeg does not fit its header: {_text(message)}"
