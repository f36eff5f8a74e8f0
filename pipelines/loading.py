"""What all loaders share, and the choice among them.

A loader is stored bytes -> uint8 crops, with labels and indices. Which images a step sees (`pipelines.order`) and which
boxes their views are cut from (`pipelines.views`) is the same in all of them; colours are changed on the training
device, by one code for all. So a recipe means the same whatever loads it.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from kernels import photometric
from kernels.transfer import to_device
from pipelines.batch import ViewBatch
from pipelines.config import LoaderConfig
from pipelines.order import EpochOrder
from pipelines.policies import apply_policies
from pipelines.sources import DataError, Source
from pipelines.unchanged import check_unchanged
from pipelines.views import View, draw_plan_boxes, draw_plan_photometric


class Loader(Protocol):
    """What the trainer asks of a loader."""

    source: Source

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[ViewBatch]]:
        """This rank's micro-batches of each step of an epoch, from step `first_step` of it on."""
        ...

    def state(self) -> Tensor | None:
        """What a checkpoint must hold for `epoch` to go on [n] uint8; None: nothing but epoch and step."""
        ...

    def load_state(self, state: Tensor) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Crops:
    """What a loader makes of the images at `indices`, on the host or on the training device."""

    crops: Tensor  # [V, n, S, S, 3] uint8
    indices: Tensor  # [n] int64 on the CPU, positions in the source


class StreamedLoader(ABC):
    """Images are decoded as they are needed, a bounded number of batches ahead of the training.

    Args:
        source: the images.
        plan: the views of one image.
        size: side of a view, pixels.
        batch_size: images a step, of all ranks together.
        seed: of the run.
        device: where the views are wanted.
        accumulation: micro-batches that a rank's share of a step is cut into.
        config: the recipe's loader settings.

    Raises:
        DataError: fewer images than a batch, or a source that this loader cannot read.
        ValueError: the batch cannot be divided evenly.
    """

    def __init__(
        self,
        source: Source,
        plan: tuple[View, ...],
        *,
        size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        config: LoaderConfig | None = None,
    ) -> None:
        self.source, self.plan, self.size, self.seed, self.device = source, plan, size, seed, device
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.config = config or LoaderConfig()
        self.order = EpochOrder(
            len(source),
            batch_size,
            seed,
            name=f"{source.name}/{source.split}",
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            config=self.config,
            addresses=source.images.addresses if self.config.order == "quasi_random" else None,
        )
        self.workers = self.config.workers or cores_of_a_rank()

    @abstractmethod
    def crops(self, epoch: int, shares: Iterable[Tensor]) -> Generator[Crops, None, None]:
        """The crops of each of `shares` ([n] int64 indices, any number of them), in that order.

        To be closed: what it holds is released then, however far it came.
        """

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[ViewBatch]]:
        check_unchanged(self.source.images)
        with closing(self.on_device(self.crops(epoch, self.order.shares(epoch, first_step)))) as batches:
            for crops in batches:
                yield self._micro_batches(crops, epoch)

    def boxes(self, indices: Tensor, epoch: int, sizes: Tensor) -> Tensor:
        """[V, n, 4] int64 (top, left, height, width) of the images at `indices`, whose sizes are [n, 2] pixels."""
        return draw_plan_boxes(
            self.plan,
            seed=self.seed,
            epoch=epoch,
            indices=indices,
            heights=sizes[:, 0],
            widths=sizes[:, 1],
            size=self.size,
        )

    def state(self) -> Tensor | None:
        return None

    def load_state(self, state: Tensor) -> None:
        refuse_state()

    @abstractmethod
    def close(self) -> None:
        """Release threads, processes and files."""

    def on_device(self, batches: Generator[Crops, None, None]) -> Generator[Crops, None, None]:
        """The same with the crops on the training device: the next is copied there while the last is in use."""
        if self.device.type != "cuda":
            with closing(batches):
                yield from batches
            return
        stream = torch.cuda.Stream(self.device)

        def copied() -> Generator[tuple[Crops, Any], None, None]:
            torch.cuda.set_stream(stream)  # of the thread that runs this
            with closing(batches):
                for batch in batches:
                    yield Crops(to_device(batch.crops, self.device), batch.indices), stream.record_event()

        with closing(in_background(copied(), 1)) as ready:
            for batch, copy in ready:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copy)
                batch.crops.record_stream(current)
                yield batch

    def _micro_batches(self, batch: Crops, epoch: int) -> list[ViewBatch]:
        parts = zip(batch.crops.chunk(self.accumulation, dim=1), batch.indices.chunk(self.accumulation), strict=True)
        return [render(self.source, self.plan, crops, indices, seed=self.seed, epoch=epoch) for crops, indices in parts]


def render(
    source: Source, plan: tuple[View, ...], crops: Tensor, indices: Tensor, *, seed: int, epoch: int
) -> ViewBatch:
    """The last half of every loader, on the device of `crops` [V, n, S, S, 3]: policies, colours, blur, statistics."""
    crops = apply_policies(plan, crops, seed=seed, epoch=epoch, indices=indices)
    params = draw_plan_photometric(plan, seed=seed, epoch=epoch, indices=indices, size=crops.shape[2])
    views = photometric(crops.flatten(0, 1), params, mean=source.mean, std=source.std)
    labels, rows = (to_device(values, crops.device) for values in (source.labels[indices], indices))
    return ViewBatch(views.unflatten(0, crops.shape[:2]), labels, rows, indices)


def cores_of_a_rank() -> int:
    """The cores that this process may use, shared with the other ranks of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_of_this_machine())


def ranks_of_this_machine() -> int:
    """As torchrun or DeepSpeed's launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def refuse_state() -> NoReturn:
    raise DataError(
        "the checkpoint holds where DALI's own readers stood (data.loader=dali, data.reader=dali), and this run does"
        " not read by them (data.reader=ours); resume with the settings that it was written with"
    )


T = TypeVar("T")
_END = object()


def in_background(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """Run a generator in a thread of its own, at most `ahead` items before they are asked for.

    Its exception is raised here. Closing this ends the thread and closes the generator, wherever it stands.
    """
    made: queue.Queue[Any] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put((item, None)):
                        return
        except BaseException as error:
            put((None, error))
        else:
            put((_END, None))

    thread = threading.Thread(target=work, name="twinstream-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        thread.join()
