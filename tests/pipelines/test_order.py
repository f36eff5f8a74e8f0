"""The order of epochs: every image once, the same for any number of ranks, wherever an epoch is entered."""

import numpy as np
import pytest
import torch

from pipelines.config import LoaderConfig
from pipelines.draw import permutation
from pipelines.order import EpochOrder
from pipelines.stored.images import DataError


def order(images: int = 1000, batch: int = 24, **changes: object) -> EpochOrder:
    settings = {k: changes.pop(k) for k in ("order", "last") if k in changes}
    return EpochOrder(images, batch, 3, name="set", config=LoaderConfig(**settings), **changes)


@pytest.mark.parametrize("kind", ["random", "quasi_random"])
@pytest.mark.parametrize(("last", "steps"), [("drop", 41), ("pad", 42)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_once_an_epoch(kind: str, last: str, steps: int, world_size: int) -> None:
    for epoch in range(3):
        ranks = [order(order=kind, last=last, rank=r, world_size=world_size).shares(epoch) for r in range(world_size)]
        assert {len(shares) for shares in ranks} == {steps}
        batches = [torch.cat(parts).tolist() for parts in zip(*ranks, strict=True)]
        seen = [index for batch in batches for index in batch]
        whole = order(order=kind, last=last).epoch(epoch).tolist()
        assert sorted(whole) == list(range(1000))
        assert seen == (whole[: 41 * 24] if last == "drop" else whole + whole[: 42 * 24 - 1000])


@pytest.mark.parametrize("kind", ["random", "quasi_random"])
def test_an_epoch_can_be_entered_anywhere(kind: str) -> None:
    whole = order(order=kind).shares(5)
    for first in (1, 40, 41):
        later = order(order=kind).shares(5, first)
        assert len(later) == 41 - first
        assert all(torch.equal(a, b) for a, b in zip(later, whole[first:], strict=True))


def test_random_order_is_the_permutation_of_the_draws() -> None:
    assert torch.equal(order().epoch(7), permutation(3, 7, 1000))
    assert not torch.equal(order().epoch(7), order().epoch(8))


def test_quasi_random_order_stays_within_windows_of_the_disk() -> None:
    images, batch = 64 * 128 * 3, 32
    addresses = np.random.default_rng(0).permutation(images)  # image i lies at addresses[i]
    epochs = [order(images, batch, order="quasi_random", addresses=addresses).epoch(e) for e in (0, 1)]
    for epoch in epochs:
        blocks = addresses[epoch.numpy()] // 128
        windows = [set(part.tolist()) for part in np.split(blocks, 3)]
        assert [len(window) for window in windows] == [64, 64, 64], "64 blocks are in use at a time"
        assert not windows[0] & windows[1]
        # Mixed: neighbours in the order come from one block about once in 64.
        assert (np.diff(blocks) == 0).mean() < 0.03
    assert not torch.equal(*epochs)
    first = [set((addresses[epoch[: 64 * 128].numpy()] // 128).tolist()) for epoch in epochs]
    assert len(first[0] & first[1]) < 40, "other blocks meet in the next epoch"


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match=r"set has 10 training images, fewer than batch_size=24"):
        order(10)
    with pytest.raises(ValueError, match="batch_size=24 cannot be divided over 5 ranks × 1"):
        order(world_size=5)
