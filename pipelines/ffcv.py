"""FFCV's files, read by our own loop.

A .beton is a table of sizes and places, and the images behind it: all that a loader needs to draw crops before it
decodes. We keep FFCV's format, so its own tools read our files and we read theirs, and leave its Loader: that one
decodes an image once a view and in full, recycles the memory of batches that are still in use, leaks a thread at each
`break`, waits for ever for a worker that failed, compiles for half a minute, and returns noise for damaged files.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels.crop import numba_crop_resize
from kernels.jpeg import JpegError, jpeg_decoder, why_no_jpeg_decoder
from pipelines.native import Decoder, NativeLoader, Stored
from pipelines.packed.images import BetonImages
from pipelines.stored.images import DataError


class FFCVLoader(NativeLoader):
    """`NativeLoader` over a .beton; without a compiler or jpeglib.h it decodes with FFCV's own library."""

    def __init__(self, source: Any, *args: Any, **settings: Any) -> None:
        if not isinstance(source.images, BetonImages):
            raise DataError(
                f"data.loader=ffcv reads .beton files, and {source.name} is not one; convert it (python -m"
                " tools.convert SOURCE DEST --to ffcv) and set data.root to DEST, or set data.loader=auto"
            )
        super().__init__(source, *args, **settings)

    def _find_decoder(self) -> Decoder:
        decoder = jpeg_decoder()
        if decoder is not None:
            return decoder
        try:
            return FFCVDecoder()
        except ImportError as error:
            raise DataError(
                f"data.loader=ffcv needs a JPEG decoder: {why_no_jpeg_decoder()}, and FFCV's cannot be imported"
                f" ({error}); install what is missing, or set data.loader=dali or plain"
            ) from error


class FFCVDecoder:
    """What `kernels.jpeg.JpegDecoder` does, by FFCV's library: the whole image is decoded, once for all its views."""

    def __init__(self) -> None:
        from ffcv.libffcv import ctypes_imdecode

        self._imdecode = ctypes_imdecode
        self._crop = numba_crop_resize()

    def header(self, data: Stored) -> Any:
        """Sizes are in the table of a .beton, and what is in one is upright RGB."""
        if bytes(data[:2]) != b"\xff\xd8":
            raise JpegError(0, "not a JPEG")
        return SimpleNamespace(supported=True, orientation=1)

    def decode_crops(
        self,
        images: Any,
        boxes: np.ndarray,
        out: np.ndarray,
        *,
        sizes: np.ndarray,
        scaled: bool,
        begin: int,
        end: int,
    ) -> None:
        size = out.shape[2]
        for place in range(begin, end):
            own = boxes[:, place]
            image, denominator = images[place], 1
            if isinstance(image, bytes) or image.ndim == 1:
                image = np.frombuffer(image, np.uint8)
                if scaled:
                    denominator = max(d for d in (1, 2, 4, 8) if d == 1 or own[:, 2:].min() >= d * size)
                image = self._decode(place, image, sizes[place], denominator)
            height, width = image.shape[:2]
            start = own[:, :2] // denominator
            extent = np.maximum(-(-(own[:, :2] + own[:, 2:]) // denominator) - start, 1)
            cut = np.ascontiguousarray(np.concatenate([start, extent], axis=1), np.int64)
            views = np.empty((len(own), size, size, 3), np.uint8)
            rows, limits = np.zeros(len(own), np.int64), np.tile(np.array([height, width], np.int64), (len(own), 1))
            self._crop(np.ascontiguousarray(image)[None], cut, rows, limits, views, 0, len(own))
            out[:, place] = views

    def _decode(self, place: int, data: np.ndarray, size: np.ndarray, denominator: int) -> np.ndarray:
        height, width = (int(n) for n in size)
        image = np.empty((-(-height // denominator), -(-width // denominator), 3), np.uint8)
        failed = self._imdecode(
            data.ctypes.data,
            data.size,
            height,
            width,
            image.ctypes.data,
            height,
            width,
            0,
            0,
            1,
            denominator,
            False,
            False,
        )
        if failed:  # of warnings too
            raise JpegError(place, "FFCV's decoder refuses it")
        return image
