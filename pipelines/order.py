"""Which images each step of an epoch sees: a pure function of (seed, epoch, step)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.config import LoaderConfig
from pipelines.draw import permutation
from pipelines.stored.images import DataError

_BLOCK = 128  # neighbours on the disk that quasi-random order keeps near each other
_BLOCKS = 64  # at least so many blocks are mixed, since neighbours are often of one class


class EpochOrder:
    """The order of every epoch, cut into global batches and those into the ranks' shares.

    Neither the number of ranks nor where an epoch is entered changes what a step sees.

    Args:
        images: how many there are.
        batch_size: images a step, of all ranks together.
        seed: of the run.
        config: `order` and `last`.
        addresses: [N] int64, grows with the place on the disk; None: images lie in order.

    Raises:
        DataError: fewer images than a batch.
        ValueError: the batch cannot be divided evenly over the ranks and micro-batches.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        name: str,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        config: LoaderConfig | None = None,
        addresses: np.ndarray | None = None,
    ) -> None:
        config = config or LoaderConfig()
        if images < batch_size:
            raise DataError(
                f"{name} has {images} training images, fewer than batch_size={batch_size}; choose at most {images}"
            )
        if batch_size % (world_size * accumulation):
            raise ValueError(
                f"batch_size={batch_size} cannot be divided over {world_size} ranks × {accumulation} micro-batches"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.steps = count_steps(images, batch_size, config.last)
        self._stored = None
        if config.order == "quasi_random":
            order = np.arange(images) if addresses is None else np.argsort(addresses, kind="stable")
            self._stored = torch.from_numpy(order)

    def epoch(self, epoch: int) -> Tensor:
        """[N] int64: every image once."""
        order = permutation(self.seed, epoch, self.images)
        return order if self._stored is None else self._quasi_random(epoch, order)

    def shares(self, epoch: int, first_step: int = 0) -> list[Tensor]:
        """The images of this rank [batch_size / ranks] at each step from `first_step` on.

        With `last: pad` the last batch is filled up from the beginning of the same epoch.
        """
        order = self.epoch(epoch)
        order = torch.cat([order, order[: max(0, self.steps * self.batch_size - self.images)]])
        starts = range(first_step * self.batch_size, self.steps * self.batch_size, self.batch_size)
        return [order[start + self.rank * self.share :][: self.share] for start in starts]

    def _quasi_random(self, epoch: int, order: Tensor) -> Tensor:
        """Blocks of neighbours in random order; within a window of many blocks, images in random order."""
        assert self._stored is not None
        blocks = -(-self.images // _BLOCK)
        window = max(4 * self.batch_size // _BLOCK, _BLOCKS)  # blocks that are mixed
        place = torch.empty(blocks, dtype=torch.int64)  # of each block, among the blocks
        place[permutation(self.seed, epoch, blocks)] = torch.arange(blocks)
        rank = torch.empty(self.images, dtype=torch.int64)  # of each image, in fully random order
        rank[order] = torch.arange(self.images)
        windows = place[torch.arange(self.images) // _BLOCK] // window
        return self._stored[torch.argsort(windows * self.images + rank[self._stored])]


def count_steps(images: int, batch_size: int, last: str) -> int:
    """Steps of an epoch: whole batches, or with `last` "pad" also the one that is filled up."""
    return images // batch_size if last == "drop" else -(-images // batch_size)
