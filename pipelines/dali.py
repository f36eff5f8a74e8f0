"""NVIDIA DALI as the decoder: on a GPU by its JPEG engines, on a CPU with libjpeg-turbo.

By default DALI is fed: the order, the boxes and the files' bytes are ours, so it shows the images and crops of every
other loader and begins at any step. With `data.reader=dali` it reads and draws by itself (`pipelines.dali_readers`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.dali_pipelines import Batch, CropPipeline, DecodeError, Engine, dali
from pipelines.dali_readers import DaliReader
from pipelines.loading import Crops, StreamedLoader, refuse_state
from pipelines.stored.images import DataError, decode_bytes, upright_jpeg
from pipelines.unchanged import check_unchanged

_TOGETHER = 16  # images that a thread reads at a time


class DaliLoader(StreamedLoader):
    """`StreamedLoader` with DALI's decoder, crop and resize on `config.workers` threads, or on the GPU.

    An upright gray or RGB JPEG is decoded by DALI (`config.decode`). Anything else (PNG, CMYK, what EXIF turns, ...)
    is decoded as everywhere in this project, by `pipelines.stored.images.decode_bytes`, and only cut by DALI. The
    crops of a batch are a tensor of their own, which stays as it is for as long as it is kept.

    Raises:
        DataError: DALI is not installed, or `decode: mixed` without a GPU; later on, an image that cannot be decoded.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        dali()
        on_gpu = self.device.type == "cuda"
        if self.config.decode == "mixed" and not on_gpu:
            raise DataError(
                f"data.decode=mixed decodes on a GPU, but this run is on {self.device}; set data.decode=cpu"
                " or leave it out"
            )
        mixed = on_gpu and self.config.decode != "cpu"
        self.engine = Engine(self.device, mixed, self.workers, self.config.hw_decoder_load)
        known = self.source.images.sizes
        self._sizes = np.zeros((len(self.source), 2), np.int32) if known is None else np.asarray(known)
        self._readers = ThreadPoolExecutor(self.workers, "twinstream-read")
        self._idle: CropPipeline | None = None
        self._reader = DaliReader(self, self.engine) if self.config.reader == "dali" else None

    def crops(self, epoch: int, shares: Iterable[Tensor]) -> Generator[Crops, None, None]:
        with closing(self._batches(epoch, shares)) as batches:
            larger = next(batches, None)
            while larger is not None:
                larger = yield from self._run(chain([larger], batches), len(larger.indices))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[ViewBatch]]:
        if self._reader is None:
            yield from super().epoch(epoch, first_step)
            return
        check_unchanged(self.source.images)
        with closing(self.on_device(self._reader.crops(epoch, first_step))) as batches:
            for crops in batches:
                self._reader.delivered()
                yield self._micro_batches(crops, epoch)

    def state(self) -> Tensor | None:
        return None if self._reader is None else self._reader.state()

    def load_state(self, state: Tensor) -> None:
        if self._reader is None:
            refuse_state()
        self._reader.load_state(state)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._idle = None
        self._readers.shutdown(cancel_futures=True)

    def _run(self, batches: Iterator[Batch], at_least: int) -> Generator[Crops, None, Batch | None]:
        """The crops of `batches` up to the first that has more images than the pipeline was built for: that one is
        returned."""
        # Taken, not shared: two epochs that are read in turns have one each.
        idle, self._idle = self._idle, None
        fits = idle is not None and idle.max_batch >= at_least
        pipeline = idle if idle and fits else CropPipeline(self.engine, len(self.plan), self.size, at_least)
        larger: list[Batch] = []

        def fitting() -> Iterator[Batch]:
            for batch in batches:
                if len(batch.indices) > pipeline.max_batch:
                    larger.append(batch)
                    return
                yield batch

        try:
            with closing(pipeline.run(fitting())) as done:
                for batch, crops in done:
                    yield Crops(crops, batch.indices)
        except DecodeError as error:
            raise self._culprits(error) from error
        finally:
            self._idle = pipeline if pipeline.usable else None
        return larger[0] if larger else None

    def _batches(self, epoch: int, shares: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """Images are read on threads, `config.ahead` batches before DALI asks for them."""
        waiting: deque[tuple[Tensor, list[Future[list[np.ndarray]]]]] = deque()
        try:
            for indices in shares:
                parts = [part.tolist() for part in indices.split(_TOGETHER)]
                waiting.append((indices, [self._readers.submit(self._load, part) for part in parts]))
                if len(waiting) > self.config.ahead:
                    yield self._batch(epoch, *waiting.popleft())
            while waiting:
                yield self._batch(epoch, *waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _batch(self, epoch: int, indices: Tensor, parts: list[Future[list[np.ndarray]]]) -> Batch:
        images = [image for part in parts for image in part.result()]
        boxes = self.boxes(indices, epoch, torch.from_numpy(self._sizes[indices.numpy()]))
        return Batch(indices, images, boxes.transpose(0, 1).to(torch.int32).contiguous().numpy())

    def _load(self, indices: list[int]) -> list[np.ndarray]:
        """Each image as DALI gets it (`Batch.images`); its size is in `_sizes` from now on."""
        return [self._load_one(index) for index in indices]

    def _load_one(self, index: int) -> np.ndarray:
        data, where = self.source.images.read(index), self.source.images.where(index)
        if isinstance(data, np.ndarray) and data.ndim == 3:
            image, size = data, data.shape[:2]
        elif (upright := upright_jpeg(data)) is not None:
            image, size = np.frombuffer(data, np.uint8), upright
        else:
            image = decode_bytes(data, where)
            size = image.shape[:2]
        known = tuple(self._sizes[index].tolist())
        if not all(known):
            self._sizes[index] = size
        elif known != size:  # boxes were drawn for another image: DALI would fill them up with black
            raise DataError(
                f"{where} has {size[0]} x {size[1]} pixels, and {known[0]} x {known[1]} were expected: it is damaged,"
                " or was changed during the run; put the old one back, or convert the set again"
            )
        return image

    def _culprits(self, failure: DecodeError) -> DataError:
        """What to say of a batch that DALI gave up on: Pillow tells which images are broken."""
        batch, where = failure.batch, self.source.images.where
        broken = []
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            try:
                if image.ndim == 1:
                    decode_bytes(image, where(index))
            except DataError as error:
                broken.append(str(error))
        if broken:
            more = f" (and {len(broken) - 3} more of this batch)" if len(broken) > 3 else ""
            return DataError("; ".join(broken[:3]) + more)
        names = ", ".join(where(index) for index in batch.indices.tolist())
        return DataError(
            f"DALI cannot decode one of these images, though Pillow can decode all: {names}. DALI says: {failure};"
            " set data.loader=native or plain"
        )
