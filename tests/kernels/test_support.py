"""The support set: a ring buffer, normalised once, the same on every rank and after a restart."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.support import SupportSet
from tests.distributed import run_ranks


def batches(sizes: list[int], width: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found, start = [], 0
    for size in sizes:
        ids = torch.arange(start, start + size)
        found.append((torch.randn(size, width, generator=generator) * 7, ids, ids % 5))
        start += size
    return found


def last(sizes: list[int], capacity: int, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A plain list of all rows ever seen, cut to its last ones: (unit rows in float64, ids, number of the enqueue)."""
    rows, ids, when = [], [], []
    for number, (new, new_ids, _) in enumerate(batches(sizes, width)):
        for row, identity in zip(new.double().numpy(), new_ids.tolist(), strict=True):
            rows.append(row / np.sqrt((row * row).sum()))
            ids.append(identity)
            when.append(number)
    return np.array(rows[-capacity:]), np.array(ids[-capacity:]), np.array(when[-capacity:])


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        (10, [4]),
        (10, [4, 4, 4]),  # the third wraps around
        (10, [10]),
        (10, [5, 5, 5]),
        (10, [3, 10, 3]),
        (10, [4, 23, 2]),  # more than fits: the last rows stay
        (7, [30, 1, 1]),
        (1, [1, 3, 1]),
        (8, [0, 3, 0, 9]),
    ],
)
def test_it_holds_the_last_rows(capacity: int, sizes: list[int]) -> None:
    support = SupportSet(capacity, 6, torch.float32)
    for rows, ids, labels in batches(sizes):
        support.enqueue(rows, ids, labels)
    rows, ids, when = last(sizes, capacity)
    assert support.filled == len(ids)
    assert support.is_full == (sum(sizes) >= capacity)
    order = support.ids[: support.filled].argsort()
    np.testing.assert_array_equal(support.ids[order].numpy(), ids)
    np.testing.assert_array_equal(support.labels[order].numpy(), ids % 5)
    np.testing.assert_allclose(support.rows[order].double().numpy(), rows, atol=1e-7)
    np.testing.assert_array_equal(support.age(order).numpy(), len(sizes) - 1 - when)
    assert (support.ids[support.filled :] == -1).all()


def test_unknown_labels_are_minus_one() -> None:
    support = SupportSet(4, 6)
    support.enqueue(torch.randn(3, 6), torch.arange(3))
    assert support.labels.tolist() == [-1, -1, -1, -1]
    assert support.ids.tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_rounded_once_from_the_normalised(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    rows[0] = 0
    rows[1] *= 1e30
    rows[2] *= 1e-9
    support = SupportSet(50, 33, dtype)
    support.enqueue(rows, torch.arange(50))
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    assert support.rows.dtype == dtype
    assert (support.rows[0] == 0).all()
    half_a_step = torch.finfo(dtype).eps / 2 * unit.abs() + torch.finfo(torch.float32).eps
    assert ((support.rows.double() - unit).abs() <= half_a_step * 1.01).all()


@pytest.mark.parametrize("backend", ["tiled", "reference", "triton"])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_of_a_half_filled_set(backend: str, excluded: bool, k: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    support = SupportSet(40, 6, torch.float32).to(device)
    rows, ids, _ = batches([25])[0]
    support.enqueue(rows.to(device), ids.to(device) % 9)
    queries = torch.randn(11, 6, generator=torch.Generator().manual_seed(1)) * 100
    query_ids = torch.arange(11) % 9
    found, places = support.nearest(
        queries.to(device), k, exclude_ids=query_ids.to(device) if excluded else None, backend=backend
    )
    cosines = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(rows.double()).T
    if excluded:
        cosines[query_ids[:, None] == (ids % 9)[None, :]] = -2
    expected, order = cosines.sort(dim=1, descending=True)
    np.testing.assert_array_equal(places.cpu().numpy(), order[:, :k].numpy())
    np.testing.assert_allclose(found.cpu().numpy(), expected[:, :k].numpy(), atol=1e-6)


def test_too_few_rows_are_refused() -> None:
    support = SupportSet(8, 6)
    with pytest.raises(ValueError, match="k=1 neighbours of a support set of which 0 rows are filled"):
        support.nearest(torch.randn(2, 6))
    support.enqueue(torch.randn(3, 6), torch.arange(3))
    with pytest.raises(ValueError, match=r"k=4 .* 3 rows"):
        support.nearest(torch.randn(2, 6), k=4)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    support = SupportSet(8, 6)
    before = copy.deepcopy(support.state_dict())
    for rows, ids, labels, message in (
        (torch.randn(3, 5), torch.arange(3), None, r"rows are \[3, 5\]"),
        (torch.ones(3, 6, dtype=torch.int64), torch.arange(3), None, "int64, expected"),
        (torch.randn(3, 6), torch.arange(4), None, r"ids are \[4\]"),
        (torch.randn(3, 6), torch.arange(3).float(), None, r"ids are .*float32"),
        (torch.randn(3, 6), torch.arange(3), torch.arange(2), r"labels are \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            support.enqueue(rows, ids, labels)
    assert all(torch.equal(before[name], value) for name, value in support.state_dict().items())
    for arguments, message in (((0, 6), r"\[0, 6\]"), ((4, 0), r"\[4, 0\]"), ((4, 6, torch.float64), "float64")):
        with pytest.raises(ValueError, match=message):
            SupportSet(*arguments)


def test_a_restored_set_goes_on_as_if_nothing_had_happened() -> None:
    first, *rest = batches([13, 9, 4])
    whole = SupportSet(10, 6)
    whole.enqueue(*first)
    saved = copy.deepcopy(torch.nn.ModuleDict({"support": whole}).state_dict())
    restored = SupportSet(10, 6)
    torch.nn.ModuleDict({"support": restored}).load_state_dict(saved)
    for batch in rest:
        whole.enqueue(*batch)
        restored.enqueue(*batch)
    assert restored.filled == whole.filled
    for name, value in whole.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name
    assert torch.equal(whole.age(torch.arange(10)), restored.age(torch.arange(10)))


def test_a_search_copies_no_bank() -> None:
    support = SupportSet(4096, 64, torch.float32)
    support.enqueue(torch.randn(4096, 64), torch.arange(4096))
    queries = torch.randn(8, 64)
    support.nearest(queries)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        support.nearest(queries)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < support.rows.numel() * support.rows.element_size() / 2


def on_two_ranks(group: dist.ProcessGroup) -> tuple[dict[str, Tensor], str]:
    rank = dist.get_rank(group)
    support = SupportSet(10, 6, torch.bfloat16)
    for rows, ids, labels in batches([6, 6, 6, 24]):
        half = len(rows) // 2
        mine = slice(rank * half, (rank + 1) * half)
        support.enqueue(rows[mine], ids[mine], labels[mine], group=group)
    state = {name: value.clone() for name, value in support.state_dict().items()}
    try:
        support.enqueue(torch.randn(3 + rank, 6), torch.arange(3 + rank), group=group)
    except ValueError as error:
        return state, str(error)
    return state, ""


def test_two_ranks_hold_what_one_process_would() -> None:
    alone = SupportSet(10, 6, torch.bfloat16)
    for rows, ids, labels in batches([6, 6, 6, 24]):
        alone.enqueue(rows, ids, labels)
    for state, refusal in run_ranks(2, on_two_ranks):
        for name, value in alone.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert "different shape" in refusal
