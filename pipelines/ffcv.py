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
from pipelines.jpeg.decoder import JpegError, jpeg_decoder, why_no_jpeg_decoder
from pipelines.native import Decoder, NativeLoader, Stored
from pipelines.packed.images import BetonImages
from pipelines.stored.images import DataError, upright_jpeg


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
    """What our `JpegDecoder` does, by FFCV's library: the whole image is decoded, once for all its views."""

    def __init__(self) -> None:
        from ffcv.libffcv import ctypes_imdecode

        self._imdecode = ctypes_imdecode
        self._crop = numba_crop_resize()

    def header(self, data: Stored) -> Any:
        """Sizes are in the table of a .beton, and what is in one is upright RGB."""
        if upright_jpeg(data) is None:
            raise JpegError(0, "not an upright JPEG in gray or RGB, or too large")
        return SimpleNamespace(supported=True, orientation=1, height=0, width=0)

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
            image = images[place]
            if isinstance(image, bytes) or image.ndim == 1:
                image = self._decode(place, np.frombuffer(image, np.uint8), *sizes[place].tolist())
            views = np.empty((len(boxes), size, size, 3), np.uint8)
            rows, limits = np.zeros(len(boxes), np.int64), np.tile(np.int64(image.shape[:2]), (len(boxes), 1))
            own = np.ascontiguousarray(boxes[:, place])
            self._crop(np.ascontiguousarray(image)[None], own, rows, limits, views, 0, len(boxes))
            out[:, place] = views

    def _decode(self, place: int, data: np.ndarray, height: int, width: int) -> np.ndarray:
        if upright_jpeg(data) != (height, width):  # it would write beyond the end of the image
            raise JpegError(place, f"its header says something else than {height} x {width} pixels")
        image = np.empty((height, width, 3), np.uint8)
        whole = height, width, 0, 0, 1, 1, False, False  # no crop, no scaling, no mirroring
        if self._imdecode(data.ctypes.data, data.size, height, width, image.ctypes.data, *whole):  # warnings too
            raise JpegError(place, "FFCV's decoder refuses it")
        return image
