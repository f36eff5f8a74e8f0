"""The table of what was computed of an image once."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from trainers.parts.remembered import RememberedRows

WIDTH = 3


def rows_of(images: torch.Tensor) -> torch.Tensor:
    """What there is to be computed of these images."""
    return (images[:, None] * 10 + torch.arange(WIDTH)).half()


class Computed:
    """Computes rows of a batch of images, and notes how many were asked for."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.counts: list[int] = []

    def __call__(self, places: torch.Tensor) -> torch.Tensor:
        self.counts.append(len(places))
        return rows_of(self.images[places])


def look_up(table: RememberedRows, images: list[int]) -> list[int]:
    """Look the images up and check what comes; returns how many had to be computed, each time."""
    indices = torch.tensor(images)
    computed = Computed(indices)
    found = table.look_up(indices, computed)
    assert torch.equal(found, rows_of(indices))
    assert found.dtype == torch.float16
    return computed.counts


def test_only_what_was_not_seen_is_computed() -> None:
    table = RememberedRows(6, WIDTH, 1e9)
    assert look_up(table, [4, 0, 2]) == [3]
    assert look_up(table, [4, 0, 2]) == [3], "looking up remembers nothing: buffers change in a method's update"
    table.put(torch.tensor([4, 0, 2]), rows_of(torch.tensor([4, 0, 2])), None)
    assert look_up(table, [2, 4, 4]) == []
    assert look_up(table, [1, 4, 5, 0]) == [2]
    assert not table.complete
    table.put(torch.tensor([1, 4, 5, 3]), rows_of(torch.tensor([1, 4, 5, 3])), None)
    assert table.complete
    assert look_up(table, [5, 5, 0, 3, 1]) == []


@pytest.mark.parametrize(("most_bytes", "enabled"), [(10 * WIDTH * 2, True), (10 * WIDTH * 2 - 1, False), (0, False)])
def test_a_table_is_whole_or_not_made(most_bytes: float, enabled: bool) -> None:
    table = RememberedRows(10, WIDTH, most_bytes)
    assert table.enabled == enabled
    table.put(torch.arange(10), rows_of(torch.arange(10)), None)
    assert look_up(table, [7, 8]) == ([] if enabled else [2])
    assert table.complete == enabled


def seen_by_ranks(group: dist.ProcessGroup) -> list[list[int]]:
    """Each of two ranks sees half of the images, and then the other half."""
    table, rank = RememberedRows(8, WIDTH, 1e9), dist.get_rank(group)
    counts = []
    for batch in ([0, 1] if rank == 0 else [2, 3], [4, 1] if rank == 0 else [5, 0], [3, 7], [6, 6], [2, 5]):
        counts.append(look_up(table, batch))
        table.put(torch.tensor(batch), rows_of(torch.tensor(batch)), group)
    assert table.complete
    return counts


def test_ranks_remember_what_any_of_them_has_seen() -> None:
    assert run_ranks(2, seen_by_ranks) == [[[2], [1], [1], [2], []]] * 2
