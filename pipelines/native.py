"""Our own decoder on threads: each image is decoded once, only where its views need it, and cut at once.

Reads whatever `Images.read` gives: files, arrays, shards and .beton files (`pipelines.ffcv`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.jpeg.decoder import JpegError, jpeg_decoder, why_no_jpeg_decoder
from pipelines.loading import Crops, StreamedLoader
from pipelines.stored.images import DataError, decode_bytes

Stored = bytes | np.ndarray


class Decoder(Protocol):
    """What this loader asks of a decoder: our `JpegDecoder`, or FFCV's as `pipelines.ffcv` wraps it."""

    def header(self, data: Stored, /) -> Any: ...

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
    ) -> None: ...


class NativeLoader(StreamedLoader):
    """`StreamedLoader` on `config.workers` threads; everything that takes time releases Python's lock.

    Up to `config.ahead` batches are made at the same time. An image that cannot be decoded ends the epoch with a
    DataError that names it.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.decoder = self._find_decoder()
        known = self.source.images.sizes
        # Zeros: not known yet. Filled in as images are first read.
        self._sizes = np.zeros((len(self.source), 2), np.int32) if known is None else np.asarray(known)
        self._workers = ThreadPoolExecutor(self.workers, "twinstream-decode")
        self._conductors = ThreadPoolExecutor(self.config.ahead, "twinstream-batch")

    def _find_decoder(self) -> Decoder:
        decoder = jpeg_decoder()
        if decoder is None:
            raise DataError(
                f"data.loader=native needs our JPEG decoder, and {why_no_jpeg_decoder()}; install what is missing, or"
                " set data.loader=dali or plain"
            )
        return decoder

    def crops(self, epoch: int, shares: Iterable[Tensor]) -> Generator[Crops, None, None]:
        waiting: deque[Future[Crops]] = deque()
        try:
            for indices in shares:
                waiting.append(self._conductors.submit(self._make, epoch, indices))
                if len(waiting) > self.config.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()  # wait: nothing may run on after this

    def close(self) -> None:
        self._conductors.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def _make(self, epoch: int, indices: Tensor) -> Crops:
        """All views of the images at `indices`."""
        rows = indices.numpy()
        images: list[Stored | None] = [None] * len(rows)

        def read(part: slice) -> None:
            for place in range(part.start, part.stop):
                images[place] = image = self._read(int(rows[place]))
                self._sizes[rows[place]] = self._size(image)

        if not self._sizes[rows].all():
            self._spread(read, len(rows))
        sizes = self._sizes[rows]
        boxes = self.boxes(indices, epoch, torch.from_numpy(sizes)).numpy()
        shape = (len(self.plan), len(rows), self.size, self.size, 3)
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels = out.numpy()

        def cut(part: slice) -> None:
            for place in range(part.start, part.stop):
                if images[place] is None:
                    images[place] = self._read(int(rows[place]))
            try:
                self.decoder.decode_crops(
                    images,
                    boxes,
                    pixels,
                    sizes=sizes,
                    scaled=self.config.scaled,
                    begin=part.start,
                    end=part.stop,
                )
            except JpegError as error:
                raise self._bad(int(rows[error.position]), error.reason) from error
            for place in range(part.start, part.stop):
                images[place] = None  # free the bytes as early as can be

        self._spread(cut, len(rows))
        return Crops(out, indices)

    def _spread(self, work: Callable[[slice], None], count: int) -> None:
        """Run `work` over slices of range(count) on the workers; the first failure is raised once all have ended."""
        step = max(1, min(16, count // (4 * self.workers)))
        jobs = [self._workers.submit(work, slice(i, min(i + step, count))) for i in range(0, count, step)]
        failures = [job.exception() for job in jobs]
        for failure in failures:
            if failure is not None:
                raise failure

    def _read(self, index: int) -> Stored:
        """The stored image: a JPEG that the decoder takes, or else its pixels."""
        data = self.source.images.read(index)
        if isinstance(data, np.ndarray) and data.ndim == 3:
            return data
        try:
            header = self.decoder.header(data)
            plain = header.supported and header.orientation == 1
        except JpegError:
            plain = False  # perhaps a PNG
        return data if plain else decode_bytes(bytes(data), self.source.images.where(index))

    def _size(self, image: Stored) -> tuple[int, int]:
        if isinstance(image, np.ndarray) and image.ndim == 3:
            return image.shape[0], image.shape[1]
        header = self.decoder.header(image)
        return header.height, header.width

    def _bad(self, index: int, reason: str) -> DataError:
        return DataError(
            f"cannot decode {self.source.images.where(index)}: {reason}; put a whole one in its place and run the same"
            " command again (with one image less it would be another run)"
        )
