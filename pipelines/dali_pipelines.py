"""What DALI runs: encoded images and boxes -> crops. Imports DALI when a pipeline is built."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stored.images import DataError

_QUEUE = 2  # batches that DALI works on at once; those read ahead of it are `LoaderConfig.ahead`


@dataclass(slots=True)
class Batch:
    """What DALI is given of n images."""

    indices: Tensor  # [n] int64
    images: list[np.ndarray]  # encoded: uint8 [bytes]; pixels: uint8 [H, W, 3]
    boxes: np.ndarray  # [n, V, 4] int32 (top, left, height, width)


@dataclass(frozen=True, slots=True)
class Engine:
    """How DALI works, for whatever pipeline."""

    device: torch.device
    mixed: bool  # JPEGs decode on the GPU, and the crops stay there
    threads: int
    hw_decoder_load: float

    def settings(self) -> dict[str, Any]:
        """Arguments of every `Pipeline`. Without a device_id DALI neither needs nor touches a GPU."""
        device_id = None
        if self.mixed:
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        return {"num_threads": self.threads, "device_id": device_id, "prefetch_queue_depth": _QUEUE}

    def decode(self, encoded: Any, **options: Any) -> Any:
        """The node that decodes; fancy upsampling is what the CPU's decoder does, and Pillow and torchvision."""
        fn, types = dali().fn, dali().types
        if self.mixed:
            options |= {"hw_decoder_load": self.hw_decoder_load, "jpeg_fancy_upsampling": True}
        return fn.decoders.image(encoded, device="mixed" if self.mixed else "cpu", output_type=types.RGB, **options)

    def joined(self, outputs: list[Any]) -> Tensor:
        """The V outputs of one batch as one tensor [V, n, S, S, 3] of its own.

        This is the only copy of crops. DALI's own memory could be lent to torch without one, but as V tensors, which
        have to become one for the photometric kernel, and lie in pinned memory on their way to a GPU.
        """
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if self.mixed:
            crops = torch.stack(views)
            torch.cuda.current_stream(self.device).synchronize()  # until then DALI must not reuse its memory
            return crops
        shape = (len(views), *views[0].shape)
        return torch.stack(views, out=torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda"))


class CropPipeline:
    """Each image is decoded once and cut into V crops of size x size, resized with DALI's antialiased triangle.

    A crop is cut out before it is resized. A resize with a region of interest would save that copy, but it mixes in
    pixels from outside the box, and knows no black around the image. What is left of a difference to
    `kernels.crop_resize` is the outermost row or column, where DALI repeats the last pixel.
    """

    def __init__(self, engine: Engine, views: int, size: int, max_batch: int) -> None:
        self.engine, self.views, self.size, self.max_batch = engine, views, size, max_batch
        self._feed = _Feed()
        self._pipeline = self._define(self._feed)
        self._pipeline.build()

    @property
    def usable(self) -> bool:
        return self._pipeline is not None

    def run(self, batches: Iterator[Batch]) -> Generator[tuple[Batch, Tensor], None, None]:
        """Each batch, of at most `max_batch` images, with its crops [V, n, S, S, 3] uint8; to be closed.

        Raises:
            DecodeError: DALI gave up on a batch; this pipeline is of no more use.
        """
        given: deque[tuple[Batch, Any]] = deque()  # with the memory that DALI reads from

        def source() -> Any:
            batch = next(batches)
            given.append((batch, _inputs(batch)))
            return given[-1][1]

        pipeline, self._feed.source = self._pipeline, source
        try:
            pipeline.schedule_run()
            while not pipeline.empty():
                try:
                    outputs = pipeline.share_outputs()
                except RuntimeError as error:
                    raise DecodeError(given[0][0], str(error)) from error
                crops = self.engine.joined(outputs)
                pipeline.release_outputs()
                pipeline.schedule_run()
                yield given.popleft()[0], crops
        except DecodeError:
            self._pipeline = None
            raise
        finally:
            self._feed.source = _exhausted
            # Wait for what is in flight: it reads the memory of `given`, and the next `run` begins with its own.
            while not pipeline.empty():
                with suppress(RuntimeError):  # another broken batch
                    pipeline.outputs()
            pipeline.release_outputs()
            pipeline.schedule_run()  # finds the source exhausted, without which `reset` does nothing
            pipeline.reset()

    def _define(self, feed: _Feed) -> Any:
        fn, types = dali().fn, dali().types
        engine, views, side = self.engine, self.views, [self.size, self.size]
        # DALI rewrites Python functions for its conditionals; this one is to stay as it is.
        source = dali().pipeline.do_not_convert(lambda: feed.source())

        @dali().pipeline_def(enable_conditionals=True)
        def crops() -> tuple[Any, ...]:
            encoded, pixels, decoded, boxes = fn.external_source(
                source=source, num_outputs=4, batch=True, no_copy=True, layout=["", "HWC", "", ""]
            )
            if decoded:
                image = pixels.gpu() if engine.mixed else pixels
            else:
                # What EXIF turns does not come here, by Pillow's reading of EXIF, on which the sizes rely.
                image = engine.decode(encoded, adjust_orientation=False)
            made = []
            for view in range(views):
                box = boxes[view]
                crop = fn.slice(
                    image, start=box[:2], shape=box[2:], axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
                )
                made.append(fn.resize(crop, size=side, interp_type=types.INTERP_LINEAR, antialias=True))
            return tuple(made)

        return crops(batch_size=self.max_batch, **engine.settings())


class DecodeError(RuntimeError):
    """DALI could not decode an image of `batch`."""

    def __init__(self, batch: Batch, reason: str) -> None:
        super().__init__(reason)
        self.batch = batch


def dali() -> ModuleType:
    """The package, with `fn`, `types` and `pipeline_def`."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise DataError(
            f"data.loader=dali needs NVIDIA DALI ({error}): pip install 'twinstream[dali]'"
            " (or set data.loader=native or plain)"
        ) from error
    return nvidia.dali


_NO_BYTES, _NO_PIXELS = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)


def _inputs(batch: Batch) -> tuple[Any, ...]:
    """What the four outputs of the external source are fed with."""
    decoded = [image.ndim == 3 for image in batch.images]
    pairs = list(zip(batch.images, decoded, strict=True))
    encoded = [_NO_BYTES if done else image for image, done in pairs]
    pixels = [image if done else _NO_PIXELS for image, done in pairs]
    return encoded, pixels, np.array(decoded), batch.boxes


def _exhausted() -> tuple[Any, ...]:
    raise StopIteration


@dataclass(slots=True)
class _Feed:
    """What a pipeline's external source asks. It knows no pipeline: a cycle would keep one's threads alive."""

    source: Callable[[], tuple[Any, ...]] = _exhausted
