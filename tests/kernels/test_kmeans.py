"""A step of k-means against its formulas in float64 and against scikit-learn."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from torch import Tensor

from kernels.kmeans import kmeans_assign
from tests.distributed import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["tiled", "reference", "triton"]
SIZES = [(1, 1, 1), (50, 3, 5), (200, 70, 33), (130, 200, 130), (600, 2, 16), (40, 90, 300)]  # M, K, D


def by_definition(x: Tensor, centres: Tensor, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row after the other; also the margin by which its centre won."""
    rows, targets = x.double().cpu().numpy(), centres.double().cpu().numpy()
    if metric == "cosine":
        rows, targets = (m / np.maximum(np.sqrt((m * m).sum(1, keepdims=True)), 1e-12) for m in (rows, targets))
    ids = np.empty(len(rows), dtype=np.int64)
    sums, counts = np.zeros_like(targets), np.zeros(len(targets), dtype=np.int64)
    for i, row in enumerate(rows):
        merit = targets @ row if metric == "cosine" else -((targets - row) ** 2).sum(1)
        ids[i] = merit.argmax()
        sums[ids[i]] += row
        counts[ids[i]] += 1
    return ids, sums, counts


def assigned(x: Tensor, centres: Tensor, metric: str, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    device = DEVICE if backend == "triton" else torch.device("cpu")
    ids, sums, counts = kmeans_assign(x.to(device), centres.to(device), metric=metric, backend=backend)
    assert ids.dtype == counts.dtype == torch.int64
    assert sums.dtype == torch.promote_types(torch.promote_types(x.dtype, centres.dtype), torch.float32)
    return ids.cpu().numpy(), sums.cpu().numpy(), counts.cpu().numpy()


def compare(ours: tuple, expected: tuple, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_allclose(ours[1], expected[1], rtol=rtol, atol=atol)
    np.testing.assert_array_equal(ours[2], expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_definition(size: tuple, metric: str, backend: str) -> None:
    m, k, d = size
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, d, generator=generator)
    # Centres of different norms: the two metrics disagree about them.
    centres = torch.randn(k, d, generator=generator) * torch.linspace(0.1, 3, k)[:, None]
    compare(assigned(x, centres, metric, backend), by_definition(x, centres, metric))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_float64(metric: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, centres = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (300, 17))
    compare(assigned(x, centres, metric, backend), by_definition(x, centres, metric), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("x_in", "centres_in"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_half_precision_inputs(x_in: torch.dtype, centres_in: torch.dtype, metric: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(150, 40, generator=generator).to(x_in)
    centres = (torch.randn(30, 40, generator=generator) * 3).to(centres_in)
    compare(assigned(x, centres, metric, backend), by_definition(x, centres, metric))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equally_good_centres(metric: str, backend: str) -> None:
    x = torch.randint(-3, 4, (100, 6), generator=torch.Generator().manual_seed(0)).float()
    centres = torch.eye(6)[torch.arange(300) % 6]  # each fifty times
    ids, _, counts = assigned(x, centres, metric, backend)
    assert ids.max() < 6
    np.testing.assert_array_equal(ids, x.numpy().argmax(1))
    assert counts.sum() == 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_zero_centres_and_extreme_norms(backend: str) -> None:
    generator = torch.Generator().manual_seed(7)
    x, centres = torch.randn(60, 9, generator=generator), torch.randn(12, 9, generator=generator)
    x[3], centres[5] = 0, 0
    x[:3] *= 1e30
    x[10:13] *= 1e-30  # far below the floor of the norm: hardly anything is added
    centres[1] *= 1e25
    centres[2] *= 1e-6
    compare(assigned(x, centres, "cosine", backend), by_definition(x, centres, "cosine"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_in_one_of_many_centres(backend: str) -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).abs()
    centres = torch.cat([-torch.ones(30, 8), torch.ones(1, 8), -torch.ones(9, 8)])
    ids, sums, counts = assigned(x, centres, "cosine", backend)
    np.testing.assert_array_equal(ids, 30)
    np.testing.assert_array_equal(counts, np.eye(40, dtype=np.int64)[30] * 500)
    assert not sums[np.arange(40) != 30].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_that_are_not_adjacent_in_memory(metric: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x, centres = torch.randn(80, 24, generator=generator), torch.randn(24, 10, generator=generator)
    compare(assigned(x[::2, ::2], centres[::2].T, metric, backend), by_definition(x[::2, ::2], centres[::2].T, metric))


def test_a_step_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    x, start = generator.normal(size=(3000, 16)).astype(np.float32), generator.normal(size=(20, 16)).astype(np.float32)
    fit = KMeans(20, init=start, n_init=1, max_iter=1, algorithm="lloyd").fit(x)
    ids, sums, counts = kmeans_assign(torch.tensor(x), torch.tensor(start), metric="euclidean")
    assert (counts > 0).all()
    np.testing.assert_allclose((sums / counts[:, None]).numpy(), fit.cluster_centers_, atol=1e-5)
    np.testing.assert_array_equal(
        kmeans_assign(torch.tensor(x), torch.tensor(fit.cluster_centers_), metric="euclidean")[0].numpy(),
        fit.predict(x),
    )
    assert len(ids) == 3000


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_to_the_last_bit(backend: str) -> None:
    x, centres = torch.randn(700, 12), torch.randn(5, 12)
    first, second = (assigned(x, centres, "cosine", backend) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    ids, sums, counts = assigned(torch.randn(0, 4), torch.randn(3, 4), "cosine", backend)
    assert ids.shape == (0,)
    assert not sums.any()
    np.testing.assert_array_equal(counts, [0, 0, 0])


def test_no_matrix_of_scores() -> None:
    x, centres = torch.randn(100_000, 4), torch.randn(300, 4)
    kmeans_assign(x, centres)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kmeans_assign(x, centres)
    assert max(event.cpu_memory_usage for event in profile.events()) < 100_000 * 300 * 4 / 8


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(90, 7, generator=generator, dtype=torch.float64), torch.randn(
        6, 7, generator=generator, dtype=torch.float64
    )


def on_two_ranks(group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    x, centres = batch()
    mine = x[:50] if dist.get_rank(group) == 0 else x[50:]  # unequal shares
    return kmeans_assign(mine, centres, group=group)


def test_two_ranks_are_one_process() -> None:
    x, centres = batch()
    ids, sums, counts = kmeans_assign(x, centres)
    found = run_ranks(2, on_two_ranks)
    assert torch.equal(torch.cat([one[0] for one in found]), ids)
    for one in found:
        torch.testing.assert_close(one[1], sums, rtol=1e-12, atol=1e-12)
        assert torch.equal(one[2], counts)


def test_refusals() -> None:
    x, centres = torch.randn(4, 3), torch.randn(2, 3)
    for arguments, options, message in (
        ((x, centres), {"metric": "manhattan"}, "metric is 'manhattan'"),
        ((x, torch.randn(2, 4)), {}, r"\[4, 3\] and \[2, 4\]"),
        ((x, torch.randn(0, 3)), {}, "K and D >= 1"),
        ((x.long(), centres), {}, "x has dtype torch.int64"),
        ((x, centres.long()), {}, "centres has dtype torch.int64"),
        ((x, centres.to("meta")), {}, "centres on meta"),
        ((x, centres), {"backend": "gpu"}, "backend is 'gpu'"),
        ((x.double(), centres), {"backend": "triton"}, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            kmeans_assign(*arguments, **options)
