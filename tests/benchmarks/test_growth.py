"""Exponents of made-up curves, and what must not grow with the work, counted rather than timed."""

import contextlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.growth import main
from benchmarks.growth_cases import LOSSES
from benchmarks.growth_data import BATCH, SIDE, resident, source_of, sparse_beton, streamed
from benchmarks.growth_fit import Expected, Growth, exponent, fit_from
from benchmarks.growth_probe import Case, ProbeError, in_child
from benchmarks.growth_runs import RANKS, of_ranks
from kernels import SupportSet
from pipelines.ffcv import FFCVLoader
from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.packed.images import BetonImages
from pipelines.sources import ArrayImages
from tests.kernels.comparison import LargestTensor

SIZES = (256, 1024, 4096, 16_384, 65_536)


def growth(values: list[float], expected: float, unit: str = "bytes", sizes: tuple[int, ...] = SIZES) -> Growth:
    return Growth("made up", "curve", "rows", unit, sizes, tuple(values), Expected(expected, "made up"))


# ---- the fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_a_power_law_is_found(power: float) -> None:
    assert exponent(SIZES, [3e-7 * size**power for size in SIZES]) == pytest.approx(power, abs=1e-12)


def test_the_slope_is_that_of_least_squares() -> None:
    values = [3.0, 5.0, 40.0, 90.0, 700.0]
    expected = np.polyfit(np.log(SIZES), np.log(values), 1)[0]
    assert exponent(SIZES, values) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ([256], [1.0], "two different sizes"),
        ([256, 256], [1.0, 2.0], "two different sizes"),
        ([256, 512], [1.0], "a value of each"),
        ([256, 512], [0.0, 1.0], "positive"),
    ],
)
def test_what_has_no_exponent_is_refused(sizes: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exponent(sizes, values)


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        (SIZES, 4096),
        ((1024, 4096, 16_384, 65_536, 262_144, 1_048_576), 65_536),
        ((32, 64, 96, 128, 192, 256, 384), 128),
        (RANKS, 64),
        ((512, 2048, 8192, 32_768), 2048),  # three points, though the middle is 4,096
        ((256, 1024), 256),
    ],
)
def test_it_begins_in_the_middle_of_the_logarithms(sizes: tuple[int, ...], first: int) -> None:
    assert fit_from(sizes) == first


def test_constant_costs_do_not_hide_the_exponent() -> None:
    linear = growth([2e6 + 2000 * size for size in SIZES], 1)
    assert linear.fitted == pytest.approx(1, abs=0.1)
    assert linear.verdict == "as expected"
    assert exponent(SIZES, linear.values) < 0.8  # as all points together would have it


def test_verdicts() -> None:
    pairs = [8.0 * size**2 for size in SIZES]
    assert growth(pairs, 1).verdict == "MORE"
    assert growth(pairs, 2).verdict == "as expected"
    assert growth([1e7] * 5, 1).verdict == "less"
    assert growth([1e7 + 400 * size for size in SIZES], 0).verdict == "MORE"
    # Less than a MiB cannot be told from nothing, in bytes that are measured.
    assert growth([0, 100, 9000, 30_000, 900_000], 0).verdict == "as expected"
    assert growth([0.001, 0.001, 0.001, 0.002, 0.004], 0, "CPU s").verdict == "MORE"


# ---- the probe -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def allocated(megabytes: int) -> Iterator[Callable[[], Any]]:
    """Twice as much at its peak as at its end, beside inputs ten times as large."""
    held = np.ones(10 * megabytes << 20, np.uint8)

    def run() -> np.ndarray:
        first = np.ones(megabytes << 20, np.uint8)
        return first + held[: len(first)]

    yield run


def test_memory_is_the_peak_above_the_inputs() -> None:
    case = Case("made up", "arrays", "MiB", (4, 16, 64), allocated, {"bytes": Expected(1, "twice its size")})
    (found,) = case.grown()
    for size, value in zip(found.sizes, found.values, strict=True):
        assert value == pytest.approx(2 * size * 2**20, rel=0.02, abs=2 << 20)
    assert found.verdict == "as expected"
    (halved,) = replace(case, per=lambda size: 2 * size * 2**20).grown()
    assert halved.values[-1] == pytest.approx(1, abs=0.05)


def fail() -> None:
    raise SystemExit(3)


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(ProbeError, match="failed"):
        in_child(fail)
    with pytest.raises(ProbeError, match="signal 9"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


# ---- what must not grow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_no_loss_makes_an_array_of_pairs(case: Case) -> None:
    """2,400 candidates: the smallest matrix of pairs has 1.44 million elements, 400 centres' distances 0.96 million."""
    candidates = 2400
    with case.make(candidates) as run, LargestTensor() as largest:
        run()
    assert largest.elements < (candidates // 2) ** 2


class Touched(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements that all operations returned, together; views are not counted."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.elements += tensor.numel()
        return result


def test_an_enqueue_makes_as_much_whatever_the_queue() -> None:
    rows, ids = torch.randn(64, 16), torch.arange(64)
    made = []
    for capacity in (128, 65_536):
        support = SupportSet(capacity, 16)
        with Touched() as touched:
            support.enqueue(rows, ids)
        made.append(touched.elements)
    assert made[0] == made[1]


def test_a_lookup_makes_tiles_not_scores() -> None:
    support = SupportSet(262_144, 4)
    support.enqueue(torch.randn(262_144, 4), torch.arange(262_144))
    with LargestTensor() as largest:
        support.nearest(torch.randn(64, 4), exclude_ids=torch.arange(64))
    assert largest.elements <= 1 << 22 < 64 * 262_144


@pytest.mark.parametrize("images", [1024, 65_536])
def test_a_resident_batch_makes_as_much_whatever_the_set(images: int) -> None:
    loader = resident(source_of(ArrayImages(np.zeros((images, 4, 4, 3), np.uint8))))
    shares = loader.order.shares(0)
    with Touched() as touched:
        loader.views(shares[1], 0)
    assert touched.elements < 100 * BATCH * SIDE**2
    assert max(len(share) for share in shares) == BATCH


@pytest.mark.skipif(jpeg_decoder() is None, reason="no compiler for the decoder")
def test_a_batch_of_a_million_reads_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.packed import images as packed

    images = 1 << 20
    sparse_beton(tmp_path / "set.beton", images)
    assert (tmp_path / "set.beton").stat().st_blocks * 512 < 200 * images  # no pixel of it is on the disk
    opened = BetonImages(tmp_path / "set.beton", os_cache=False)
    assert len(opened) == images
    loader, read = streamed(FFCVLoader, opened), []
    original = packed.read_at

    def counted(file: Any, offset: int, length: int) -> bytes:
        read.append((offset, length))
        return original(file, offset, length)

    monkeypatch.setattr(packed, "read_at", counted)
    share = loader.order.shares(0)[7]
    with contextlib.closing(loader), contextlib.closing(loader.crops(0, [share])) as batches:
        crops = next(batches)
    assert torch.equal(crops.indices, share)
    assert sorted(read) == sorted((int(opened.table.offset[row]), 3 * SIDE * SIDE) for row in share.tolist())


def test_a_resident_set_is_held_once_beside_the_stored_pixels() -> None:
    """With images held out a copy is made; nothing of its size is made beside it."""
    import tracemalloc

    pixels = np.zeros((20_000, 16, 16, 3), np.uint8)
    kept = np.arange(0, 20_000, 2)
    tracemalloc.start()
    try:
        chosen = ArrayImages(pixels).select(kept).array
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert chosen.shape == (10_000, 16, 16, 3)
    assert chosen.nbytes <= peak < 1.3 * chosen.nbytes


def test_two_parts_are_joined_in_the_order_asked_for() -> None:
    first, second = (np.random.default_rng(seed).integers(0, 256, (3000, 2, 2, 3), np.uint8) for seed in (0, 1))
    rows = np.random.default_rng(2).permutation(6000)[:4500]
    expected = np.concatenate([first, second])[rows]
    np.testing.assert_array_equal(ArrayImages(first, second).select(rows).array, expected)
    assert ArrayImages(first, second).select(rows[:0]).array.shape == (0, 2, 2, 3)


# ---- the ranks, and the command ----------------------------------------------------------------------------


@pytest.mark.slow
def test_exponents_of_the_ranks() -> None:
    """The plan's formulas against what each must be by hand, 64 images a rank, D = 128."""
    found = {one.name: one for one in of_ranks()}
    assert {one.verdict for one in found.values()} == {"as expected"}
    embeddings, weights = found["simclr: sent, embeddings"], found["simclr: sent, weights' gradients"]
    for ranks, sent in zip(embeddings.sizes, embeddings.values, strict=True):
        assert sent % (2 * 64 * (ranks - 1)) == pytest.approx(0, abs=1e-3)  # whole rows of each other rank
    assert math.isclose(weights.values[-1] / weights.values[0], 2 * 1023 / 1024, rel_tol=1e-9)


def test_it_runs_to_its_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", f"{tmp_path}/found.json", "--picture", f"{tmp_path}/found.png"]
    assert main(["--small", "--only", "queue", *files]) in (0, 1)  # a small run may look as if it grew
    assert "nearest of 256 queries" in capsys.readouterr().out
    curves = json.loads((tmp_path / "found.json").read_text())["curves"]
    assert [curve["unit"] for curve in curves] == ["CPU s", "bytes"] * 2
    assert all(curve["sizes"] == [1024, 4096, 16_384] and min(curve["values"]) >= 0 for curve in curves)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "loss,colour"], "colour is not known"),
        (["--json", "nowhere/at/all.json"], "there is no folder"),
        (["--picture", "found.txt"], "expected a name that ends in .png"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
