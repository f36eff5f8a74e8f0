"""What grows with the batch, the queue and the resolution (`growth_data`: data set; `growth_runs`: the rest)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.cpu_cases import smooth_crops
from benchmarks.growth_fit import Expected
from benchmarks.growth_probe import Case
from benchmarks.harness import Run
from kernels import SupportSet, bregman_loss, crop_resize, distance_correlation, ntxent, photometric, simplex_loss
from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.views import View, draw_photometric
from trainers.parts.neighbours import neighbour_loss
from trainers.parts.prototypes import Prototypes

WIDTH = 128  # D of the embeddings
CANDIDATES = (256, 1024, 4096, 16_384, 65_536)
FEWER = (512, 2048, 8192, 32_768)  # of what takes minutes beyond
ROWS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
SIDES = (32, 64, 96, 128, 192, 256, 384)

PAIRS = Expected(2, "each of the candidates is compared with each")
ROWS_ALONE = Expected(1, "a few arrays of one row a candidate, and tiles whose size is fixed")

# ---- losses, forward and backward ----------------------------------------------------------------------


def _differentiated(value: Callable[..., Tensor], width: int = WIDTH) -> Callable[[int], Iterator[Run]]:
    """Gradients of `value` to two views of half as many images as there are candidates."""

    def make(candidates: int) -> Iterator[Run]:
        generator = torch.Generator().manual_seed(0)
        views = [torch.randn(candidates // 2, width, generator=generator).requires_grad_() for _ in range(2)]
        yield lambda: torch.autograd.grad(value(*views), views)

    return make


def _loss(
    name: str,
    value: Callable[..., Tensor],
    time: Expected = PAIRS,
    width: int = WIDTH,
    sizes: tuple[int, ...] = CANDIDATES,
) -> Case:
    make = contextmanager(_differentiated(value, width))
    return Case("loss", name, "candidates", sizes, make, {"CPU s": time, "bytes": ROWS_ALONE})


def _neighbours(z1: Tensor, z2: Tensor) -> Tensor:
    views = torch.stack([z1, z2])
    return neighbour_loss(views.detach().flip(1), views, temperature=0.1)[0]


def _soft_bregman(scores1: Tensor, scores2: Tensor) -> Tensor:
    weights = (scores1 / 0.1).softmax(1), (scores2 / 0.1).softmax(1)
    return bregman_loss(scores1, scores2, temperature=0.1, weights=weights)


@contextmanager
def _centres(candidates: int) -> Iterator[Run]:
    prototypes = Prototypes(400, WIDTH, classes=10, batch_size=candidates // 2, reseed_every=0)
    z, labels = torch.randn(candidates, WIDTH), torch.arange(candidates // 2) % 10
    while not prototypes.is_ready:
        prototypes.update(z[: candidates // 2], labels)

    def run() -> None:
        prototypes.assign(z)
        prototypes.update(z[: candidates // 2], labels)

    yield run


HARD = Expected(1, "the winners' counts stand for the columns: each view is compared with K = 100 subnetworks")

LOSSES = [
    _loss("NT-Xent", lambda z1, z2: ntxent(z1, z2, temperature=0.5)),
    _loss("NNCLR and KMCLR: neighbour loss", _neighbours),
    Case(
        "loss",
        "KMCLR: 400 centres assigned and moved",
        "candidates",
        CANDIDATES,
        _centres,
        {"CPU s": Expected(1, "each row is compared with as many centres"), "bytes": ROWS_ALONE},
    ),
    _loss("Probabilistic SimCLR: simplex", lambda z1, z2: simplex_loss(z1, z2, temperature=0.5)),
    _loss("BeCLR: Bregman, hard winners", lambda a, b: bregman_loss(a, b, temperature=0.1), HARD, width=100),
    _loss("BeCLR: Bregman, soft winners", _soft_bregman, width=50, sizes=FEWER),
    _loss("MV-MR: distance correlation", distance_correlation),
]

# ---- NNCLR's queue -------------------------------------------------------------------------------------

QUERIES = 256


def _queue(rows: int) -> tuple[SupportSet, Tensor, Tensor]:
    """A full queue, and a batch of queries with their ids."""
    generator = torch.Generator().manual_seed(0)
    support = SupportSet(rows, 256)
    for start in range(0, rows, 1024):
        support.enqueue(torch.randn(1024, 256, generator=generator), torch.arange(start, start + 1024))
    return support, torch.randn(QUERIES, 256, generator=generator), torch.arange(QUERIES)


@contextmanager
def _lookup(rows: int) -> Iterator[Run]:
    support, queries, ids = _queue(rows)
    yield lambda: support.nearest(queries, exclude_ids=ids)


@contextmanager
def _enqueue(rows: int) -> Iterator[Run]:
    support, new, ids = _queue(rows)
    yield lambda: support.enqueue(new, ids)


QUEUES = [
    Case(
        "queue",
        "nearest of 256 queries",
        "rows",
        ROWS,
        _lookup,
        {
            "CPU s": Expected(1, "the search is exact: every query meets every row"),
            "bytes": Expected(0, "scores are made in tiles, of which one is alive; beside the queue itself"),
        },
    ),
    Case(
        "queue",
        "enqueue 256 rows",
        "rows",
        ROWS,
        _enqueue,
        {
            "CPU s": Expected(0, "the batch is written over the oldest rows; no other is touched"),
            "bytes": Expected(0, "no more than the batch"),
        },
    ),
]

# ---- resolution, a pixel --------------------------------------------------------------------------------

PIXELS = 1 << 20  # of a batch, at every resolution
JITTER = View(flip=0.5, jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2)


def _count(side: int) -> int:
    return max(1, PIXELS // side**2)


def _pixels(side: int) -> float:
    return float(_count(side) * side**2)


def _photometry(view: View) -> Callable[[int], Iterator[Run]]:
    def make(side: int) -> Iterator[Run]:
        crops, indices = smooth_crops(_count(side), side), torch.arange(_count(side))
        params = draw_photometric(view, seed=0, epoch=0, indices=indices, view_index=0, size=side)
        yield lambda: photometric(crops, params, mean=[0.5] * 3, std=[0.25] * 3)

    return make


def _crop(side: int) -> Iterator[Run]:
    """Of images a quarter larger, as far as they reach."""
    whole = side * 5 // 4
    images = smooth_crops(_count(side), whole)
    boxes = torch.tensor([[0, 0, whole, whole]]).repeat(len(images), 1)
    yield lambda: crop_resize(images, boxes, side)


def _decode(side: int) -> Iterator[Run]:
    from PIL import Image

    decoder, images = jpeg_decoder(), []
    assert decoder is not None
    for pixels in smooth_crops(min(_count(side), 16), side).numpy():
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
        images.append(np.frombuffer(encoded.getvalue(), np.uint8))
    times = -(-_count(side) // len(images))
    yield lambda: [decoder.decode(image) for image in images * times]


def _a_pixel(name: str, make: Callable[[int], Iterator[Run]], why: str) -> Case:
    expected = {"CPU s": Expected(0, why)}
    return Case("resolution", name, "side", SIDES, contextmanager(make), expected, _pixels)


def resolutions() -> list[Case]:
    """Without the decoding where there is no compiler for it."""
    found = [
        _a_pixel("a pixel's colours", _photometry(JITTER), "all but the blur is done pixel by pixel"),
        _a_pixel(
            "a pixel's colours and blur",
            _photometry(JITTER.model_copy(update={"blur": 1.0})),
            "taps beyond 4.9 of the blur's deviations are left out, and these stay the same, up to 2 pixels",
        ),
        _a_pixel("a pixel cut and resized", _crop, "a fixed number of taps a pixel"),
    ]
    if jpeg_decoder() is not None:
        why = "a JPEG is blocks of 8 x 8; its header is read once"
        found.append(_a_pixel("a pixel decoded", _decode, why))
    return found
