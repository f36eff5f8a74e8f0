"""The draws are uniform, independent in each of their five arguments, the same in torch, numba and Python,
and never change between versions."""

import math

import pytest
import torch
from scipy import stats

from pipelines.draw import numba_uniform, permutation, uniform, uniform_scalar, uniforms

N = 50_000
INDICES = torch.arange(N)
STREAMS = {
    "base": (7, 3, 1, 5),
    "seed": (8, 3, 1, 5),
    "epoch": (7, 4, 1, 5),
    "view": (7, 3, 2, 5),
    "slot": (7, 3, 1, 6),
    "seed and epoch swapped": (3, 7, 1, 5),
    "epoch and view swapped": (7, 1, 3, 5),
    "view and slot swapped": (7, 3, 5, 1),
}


def _stream(seed: int, epoch: int, view: int, slot: int) -> torch.Tensor:
    return uniform(seed, epoch, INDICES, view, slot)


@pytest.mark.parametrize("name", STREAMS)
def test_uniform_by_kolmogorov_smirnov(name: str) -> None:
    u = _stream(*STREAMS[name])
    assert u.dtype == torch.float64
    assert 0 <= u.min() < u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_uniform_over_each_argument() -> None:
    """Not only along the index: one sample over 4,000 seeds, epochs, views and slots."""
    one = torch.tensor([12])
    count = range(4_000)
    columns = {
        "seed": [uniform_scalar(s, 0, 12, 0, 0) for s in count],
        "epoch": [uniform_scalar(0, e, 12, 0, 0) for e in count],
        "view": [uniform_scalar(0, 0, 12, v, 0) for v in count],
        "slot": uniforms(0, 0, one, 0, len(count))[0].tolist(),
    }
    for name, values in columns.items():
        assert stats.kstest(values, "uniform").pvalue > 1e-3, name
        assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 4 / math.sqrt(len(values)), name


def test_lowest_bits_are_used() -> None:
    scaled = _stream(7, 3, 1, 5) * 2**53
    assert (scaled == scaled.floor()).all()
    low = (scaled.to(torch.int64) & 0xFF).bincount(minlength=256)
    assert stats.chisquare(low.numpy()).pvalue > 1e-3


def test_streams_are_uncorrelated() -> None:
    values = torch.stack([_stream(*s) for s in STREAMS.values()] + [_stream(7, 3, 1, 5).roll(1)])
    correlation = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(N)
    # Nor is there structure that a correlation misses: pairs fill the unit square evenly.
    for other in values[1:]:
        cells = ((values[0] * 16).floor() * 16 + (other * 16).floor()).to(torch.int64).bincount(minlength=256)
        assert stats.chisquare(cells.numpy()).pvalue > 1e-4


def test_no_two_draws_are_equal() -> None:
    drawn = uniforms(7, 3, INDICES[:5_000], 1, 20).flatten()
    assert len(drawn.unique()) == len(drawn)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**63 - 1])
def test_torch_numba_and_python_agree_exactly(seed: int) -> None:
    compiled = numba_uniform()
    indices = torch.tensor([0, 1, 2, 1_281_166, 10**8, 2**62])
    for epoch, view, slot in [(0, 0, 0), (1, 0, 0), (99, 1, 41), (1000, 7, 2)]:
        expected = [uniform_scalar(seed, epoch, i, view, slot) for i in indices.tolist()]
        assert uniform(seed, epoch, indices, view, slot).tolist() == expected
        assert [compiled(seed, epoch, i, view, slot) for i in indices.tolist()] == expected


def test_golden_values() -> None:
    """A change here changes every run that anyone ever made: do not update these numbers."""
    indices = torch.tensor([0, 1, 5, 2**40])
    golden = {
        (0, 0, 0, 0): ["0x1.e2b96a69ad7f4p-2", "0x1.9038aa2bc6b08p-1", "0x1.1f3562beab804p-2",
        "0x1.3f9995063d794p-2"], (2**63 - 1, 7, 1, 41): [
            "0x1.db62a31c91acfp-1",
            "0x1.d2fe3a0331b80p-8",
            "0x1.b79347a287118p-1",
            "0x1.c18475e917ac8p-2",
        ],
        (42, 100, 3, 2): ["0x1.fef5644e3ab12p-1", "0x1.a91c0849230cfp-1", "0x1.2cb02a5cdd6c3p-1",
        "0x1.eb9e32ff9940fp-1"],
    }  # fmt: skip
    for (seed, epoch, view, slot), values in golden.items():
        drawn = uniform(seed, epoch, indices, view, slot).tolist()
        assert drawn == [float.fromhex(v) for v in values]
    assert permutation(7, 3, 10).tolist() == [0, 4, 8, 5, 7, 1, 6, 3, 2, 9]


def test_draws_know_nothing_of_the_batch() -> None:
    shuffled = permutation(1, 0, 1000)
    whole = uniforms(5, 2, torch.arange(1000), 1, [0, 3, 41])
    assert torch.equal(uniforms(5, 2, shuffled, 1, [0, 3, 41]), whole[shuffled])
    assert torch.equal(uniforms(5, 2, torch.tensor([17]), 1, [0, 3, 41])[0], whole[17])
    for column, slot in enumerate([0, 3, 41]):
        assert torch.equal(uniform(5, 2, torch.arange(1000), 1, slot), whole[:, column])


def test_permutation() -> None:
    order = permutation(7, 3, N)
    assert torch.equal(order.sort().values, torch.arange(N))
    assert torch.equal(order, permutation(7, 3, N))
    for other in (permutation(7, 4, N), permutation(8, 3, N), torch.arange(N)):
        assert abs(stats.spearmanr(order, other).statistic) < 4.5 / math.sqrt(N)
        assert (order == other).sum() < 12  # one fixed point is expected
    assert permutation(7, 3, 0).tolist() == []


def test_every_order_of_a_small_epoch_is_equally_likely() -> None:
    orders = torch.stack([permutation(s, e, 4) for s in range(40) for e in range(60)])
    counts = (orders * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 0, INDICES, 0, 0), "seed"),
        ((2**63, 0, INDICES, 0, 0), "seed"),
        ((0, -1, INDICES, 0, 0), "epoch"),
        ((0, 0, INDICES, -1, 0), "view"),
        ((0, 0, INDICES, 0, -1), "slots"),
        ((0, 0, INDICES.int(), 0, 0), "indices"),
    ],
)
def test_refusals(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        uniform(*arguments)


@pytest.mark.gpu
def test_same_numbers_on_a_gpu() -> None:
    assert torch.equal(uniforms(5, 2, INDICES.cuda(), 1, 43).cpu(), uniforms(5, 2, INDICES, 1, 43))
    assert torch.equal(permutation(5, 2, N, device="cuda").cpu(), permutation(5, 2, N))
