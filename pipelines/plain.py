"""torch's DataLoader with torchvision's decoder and resize: the reference for the other loaders, and the fallback."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as T

from pipelines.loading import Crops, StreamedLoader
from pipelines.sources import Source
from pipelines.stored.images import DataError, Images, decode_bytes, upright_jpeg
from pipelines.views import View, draw_plan_boxes


class PlainLoader(StreamedLoader):
    """`StreamedLoader` on `config.workers` processes, each image decoded once by torchvision."""

    def __init__(self, source: Source, plan: tuple[View, ...], **settings: Any) -> None:
        super().__init__(source, plan, **settings)
        self._shares: Iterable[Tensor] = ()
        self._epoch = 0
        self._reading = False
        self._loader = DataLoader(
            _Samples(source.images, plan, self.seed, self.size),
            batch_sampler=_Keys(self),
            num_workers=self.workers,
            prefetch_factor=max(1, -(-self.config.ahead // self.workers)),
            collate_fn=_stack,
            multiprocessing_context=_fresh_processes(),
            worker_init_fn=_live_and_die_with_the_run,
            persistent_workers=True,
        )

    def crops(self, epoch: int, shares: Iterable[Tensor]) -> Generator[Crops, None, None]:
        if self._reading:
            raise RuntimeError(
                "the plain loader reads one epoch at a time; close the other first, or make a second one"
            )
        self._epoch, self._shares, self._reading = epoch, shares, True
        try:
            for made in self._loader:
                if isinstance(made, DataError):
                    raise made
                yield made
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that decodes images died ({error}); it may have run out of memory") from error
        finally:
            self._reading = False

    def keys(self) -> Iterator[list[tuple[int, int]]]:
        for share in self._shares:
            yield [(self._epoch, index) for index in share.tolist()]

    def close(self) -> None:
        self._loader = None  # type: ignore[assignment]  # its workers end with it


def _fresh_processes() -> Any:
    """Forked from a process that has imported everything and runs nothing: no locks that our threads hold."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _live_and_die_with_the_run(worker: int) -> None:
    """A signal to the run's process group is the run's to answer, with a checkpoint: each worker is a group of its own.

    A run that was killed takes them along: torch's own watch looks at the parent process, which is the server here.
    """
    os.setpgrp()
    run = multiprocessing.parent_process()
    assert run is not None

    def watch() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class _Keys:
    """The batches of the epoch that is being read, for a DataLoader that is made once."""

    loader: PlainLoader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.loader.keys()


class _Samples(Dataset[tuple[int, Tensor] | DataError]):
    """(epoch, index) -> (index, its crops [V, S, S, 3] uint8); errors are returned, and raised where they are read."""

    def __init__(self, images: Images, plan: tuple[View, ...], seed: int, size: int) -> None:
        self.images, self.plan, self.seed, self.size = images, plan, seed, size

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor] | DataError:
        epoch, index = key
        try:
            image = _decoded(self.images, index)
        except DataError as error:
            return error
        heights, widths = (torch.tensor([n]) for n in image.shape[1:])
        where: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "indices": torch.tensor([index])}
        boxes = draw_plan_boxes(self.plan, **where, heights=heights, widths=widths, size=self.size)[:, 0].tolist()
        size = [self.size, self.size]
        crops = [T.resized_crop(image, *box, size, antialias=True).permute(1, 2, 0) for box in boxes]
        return index, torch.stack(crops)


def _stack(samples: list[tuple[int, Tensor] | DataError]) -> Crops | DataError:
    whole = [sample for sample in samples if not isinstance(sample, DataError)]
    if len(whole) < len(samples):
        return next(sample for sample in samples if isinstance(sample, DataError))
    indices, crops = zip(*whole, strict=True)
    return Crops(torch.stack(crops, dim=1), torch.tensor(indices))


def _decoded(images: Images, index: int) -> Tensor:
    """[3, H, W] uint8, upright."""
    data = images.read(index)
    if isinstance(data, np.ndarray) and data.ndim == 3:
        return torch.from_numpy(np.array(data)).permute(2, 0, 1)
    if upright_jpeg(data) is None:  # not for torchvision: a PNG, CMYK, lying on its side
        return torch.from_numpy(decode_bytes(data, images.where(index))).permute(2, 0, 1)
    encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"cannot decode {images.where(index)}: {error}; replace it") from error
