"""The search against a plain sort in float64 and against faiss, with ties, in every backend."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import nearest, nearest_cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["tiled", "reference", "triton"]
SIZES = [  # M, L, D
    (1, 1, 1),
    (3, 40, 7),
    (70, 31, 16),
    (20, 300, 40),
    (66, 129, 130),
    (5, 700, 300),
    (2, 33, 1030),
]


def by_definition(
    queries: Tensor, bank: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.double().numpy() @ bank.double().numpy().T
    if exclude is not None:
        scores[exclude[0].numpy()[:, None] == exclude[1].numpy()[None, :]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    return scores, np.where(scores == -np.inf, -1, order)


def found(queries: Tensor, bank: Tensor, k: int, exclude: tuple | None, backend: str) -> tuple[np.ndarray, np.ndarray]:
    device = DEVICE if backend == "triton" else torch.device("cpu")
    ids = None if exclude is None else tuple(one.to(device) for one in exclude)
    scores, indices = nearest(queries.to(device), bank.to(device), k=k, exclude=ids, backend=backend)
    assert scores.dtype == torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)
    assert indices.dtype == torch.int64
    return scores.cpu().numpy(), indices.cpu().numpy()


def whole_numbers(
    m: int, length: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inner products of these are exact in any order of addition, and many of them are equal."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-2, 3, (rows, d), generator=generator).to(dtype) for rows in (m, length))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_scores_come_in_the_order_of_the_bank(size: tuple, k: int, excluded: bool, backend: str) -> None:
    m, length, d = size
    queries, bank = whole_numbers(m, length, d)
    exclude = (torch.arange(m) % 4, torch.arange(length) % 5) if excluded else None
    k = min(k, length)
    expected = by_definition(queries, bank, k, exclude)
    scores, indices = found(queries, bank, k, exclude, backend)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 40, 256])
def test_identical_rows_are_taken_in_order(k: int, backend: str) -> None:
    row = torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
    scores, indices = found(row.expand(2, 24), row.expand(650, 24), k, None, backend)
    np.testing.assert_array_equal(indices, np.tile(np.arange(k), (2, 1)))
    np.testing.assert_allclose(scores, float(row.double() @ row.double().T), rtol=1e-6)


@pytest.mark.parametrize(
    ("queries_in", "bank_in"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5])
def test_scores_of_any_dtype_are_not_rounded_to_it(
    queries_in: torch.dtype, bank_in: torch.dtype, k: int, backend: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    # All cosines lie near 1, where 16 bits would hold but a few values.
    centre = torch.randn(1, 48, generator=generator)
    queries, bank = (centre + 0.05 * torch.randn(n, 48, generator=generator) for n in (33, 400))
    queries, bank = queries.to(queries_in), bank.to(bank_in)
    expected = by_definition(queries, bank, k)
    scores, indices = found(queries, bank, k, None, backend)
    np.testing.assert_allclose(scores, expected[0], rtol=2e-6)
    gaps = np.diff(np.sort(queries.double().numpy() @ bank.double().numpy().T)[:, -k - 1 :]) > 2e-5 * abs(expected[0])
    clear = gaps.all(1)  # rows whose order does not hang on the last bits of float32
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(indices[clear], expected[1][clear])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 4])
def test_fewer_than_k_allowed_rows_leave_minus_infinity_and_minus_one(k: int, backend: str) -> None:
    queries, bank = whole_numbers(3, 70, 5)
    bank_ids = torch.full((70,), 7)
    bank_ids[[10, 66]] = 8
    scores, indices = found(queries, bank, k, (torch.tensor([7, 8, 7]), bank_ids), backend)
    assert set(indices[0, :2].tolist()) <= {10, 66}
    assert not {10, 66} & set(indices[1].tolist())
    np.testing.assert_array_equal(indices[[0, 2], 2:], -1)
    np.testing.assert_array_equal(scores[[0, 2], 2:], -np.inf)
    scores, indices = found(queries, bank, k, (torch.full((3,), 7), torch.full((70,), 7)), backend)
    np.testing.assert_array_equal(indices, -1)
    np.testing.assert_array_equal(scores, -np.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_zero_rows_and_extreme_norms(size: float, k: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    queries, bank = torch.randn(9, 20, generator=generator) * size, torch.randn(90, 20, generator=generator)
    queries[4], bank[5:60] = 0, 0
    bank[-1] *= 1e18
    scores, indices = found(queries, bank, k, None, backend)
    expected = by_definition(queries, bank, k)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)


@pytest.mark.parametrize("backend", ["tiled", "reference"] + ["triton"] * torch.cuda.is_available())
@pytest.mark.parametrize("k", [1, 3])
def test_nan_never_matches(k: int, backend: str) -> None:
    queries, bank = whole_numbers(6, 50, 8)
    bank[[0, 20]] = torch.nan
    queries[5] = torch.nan
    scores, indices = found(queries, bank, k, None, backend)
    without = bank.clone()
    without[[0, 20]] = 0
    barred = torch.zeros(50, dtype=torch.int64)
    barred[[0, 20]] = 1
    expected = by_definition(queries[:5], without, k, (torch.ones(5, dtype=torch.int64), barred))
    np.testing.assert_array_equal(indices[:5], expected[1])
    np.testing.assert_array_equal(scores[:5], expected[0])
    np.testing.assert_array_equal(indices[5], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_are_not_adjacent_in_memory(k: int, backend: str) -> None:
    queries, bank = whole_numbers(20, 90, 14)
    expected = by_definition(queries[::2, 1::2], bank[5:, ::2], k)
    _, indices = found(queries[::2, 1::2], bank[5:, ::2], k, None, backend)
    np.testing.assert_array_equal(indices, expected[1])
    _, indices = found(queries.T.contiguous().T, bank.T.contiguous().T, k, None, backend)
    np.testing.assert_array_equal(indices, by_definition(queries, bank, k)[1])


@pytest.mark.parametrize(("m", "columns"), [(1, 64), (300, 1024), (37, 200)])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_across_tiles(monkeypatch, m: int, columns: int, k: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(nearest_cpu, "TILE_COLUMNS", columns)
    monkeypatch.setattr(nearest_cpu, "TILE_ROWS", 64)
    monkeypatch.setattr(nearest_cpu, "TILE_ELEMENTS", 64 * columns)
    queries, bank = whole_numbers(m, 3500, 6, dtype)
    exclude = (torch.arange(m) % 3, torch.arange(3500) % 7)
    for ids in (None, exclude):
        expected = by_definition(queries, bank, k, ids)
        scores, indices = found(queries, bank, k, ids, "tiled")
        np.testing.assert_array_equal(indices, expected[1])
        np.testing.assert_array_equal(scores, expected[0])


def test_a_bank_that_gets_better_and_better() -> None:
    queries, bank = torch.ones(5, 4), torch.arange(5000.0)[:, None].expand(5000, 4) / 1000
    scores, indices = found(queries, bank, 20, None, "tiled")
    np.testing.assert_array_equal(indices, np.tile(np.arange(4999, 4979, -1), (5, 1)))
    np.testing.assert_allclose(scores, 4 * np.tile(np.arange(4999, 4979, -1), (5, 1)) / 1000, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 20])
def test_against_faiss(k: int) -> None:
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(4)
    queries, bank = torch.randn(600, 64, generator=generator), torch.randn(9000, 64, generator=generator)
    index = faiss.IndexFlatIP(64)
    index.add(bank.numpy())
    theirs = index.search(queries.numpy(), k)
    scores, indices = nearest(queries, bank, k=k)
    np.testing.assert_allclose(scores.numpy(), theirs[0], rtol=1e-5)
    assert (indices.numpy() == theirs[1]).mean() > 0.999  # float32 scores in other orders of addition


def test_the_bank_is_shared_out_over_programs() -> None:
    """More than one share a bank, and more than one group and chunk of queries for k > 1."""
    from kernels.fused import nearest as fused
    from kernels.fused import nearest_k

    queries, bank = whole_numbers(6, 1300, 9)
    share, shares = fused.shares_of_bank(6, 1300, DEVICE)
    assert shares > 1
    assert share % fused.SHARE == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_k, "KEYS_ALIVE", 200)
        for k in (1, 5):
            expected = by_definition(queries, bank, k)
            scores, indices = found(queries, bank, k, None, "triton")
            np.testing.assert_array_equal(indices, expected[1])
            np.testing.assert_array_equal(scores, expected[0])


def test_many_neighbours_leave_triton() -> None:
    queries, bank = whole_numbers(4, 400, 6)
    np.testing.assert_array_equal(found(queries, bank, 300, None, "triton")[1], by_definition(queries, bank, 300)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2])
def test_no_queries(k: int, backend: str) -> None:
    scores, indices = found(torch.randn(0, 4), torch.randn(5, 4), k, None, backend)
    assert scores.shape == indices.shape == (0, k)


def test_no_score_matrix() -> None:
    queries, bank = torch.randn(2000, 8), torch.randn(20_000, 8)
    ids = (torch.arange(2000), torch.arange(20_000))
    for k in (1, 10):
        nearest(queries, bank, k=k, exclude=ids)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            nearest(queries, bank, k=k, exclude=ids)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest < 2000 * 20_000 * 4 / 4


def test_autocast_does_not_round() -> None:
    queries, bank = torch.randn(30, 32), torch.randn(500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [nearest(queries, bank, k=k, backend=backend)[0] for k in (1, 3) for backend in ("tiled", "reference")]
    outside = [nearest(queries, bank, k=k, backend=backend)[0] for k in (1, 3) for backend in ("tiled", "reference")]
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


def test_refusals() -> None:
    a, b, ids = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    for arguments, options, message in (
        ((a, torch.zeros(5, 3)), {}, r"share D >= 1, got \[3, 4\] and \[5, 3\]"),
        ((torch.zeros(3, 0), torch.zeros(5, 0)), {}, "share D >= 1"),
        ((a[0], b), {}, "share D"),
        ((a.long(), b), {}, "queries has dtype torch.int64"),
        ((a, b.long()), {}, "bank has dtype torch.int64"),
        ((a, b.to("meta")), {}, "bank on meta"),
        ((a, b), {"k": 6}, "k=6 must lie between 1 and the bank's 5 rows"),
        ((a, b), {"k": 0}, "k=0"),
        ((a, b), {"exclude": (ids, ids)}, r"bank_ids \[5\]\), got shapes \[3\] and \[3\]"),
        ((a, b), {"exclude": (ids.float(), torch.zeros(5))}, "ids of dtype torch.float32"),
        ((a, b), {"backend": "gpu"}, "backend='gpu' is not known"),
        ((a.double(), b), {"backend": "triton"}, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest(*arguments, **options)
