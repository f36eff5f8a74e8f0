"""What grows with the data set: one that has no pixels on the disk, or the same few images over and over."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.growth_fit import Expected
from benchmarks.growth_probe import Case
from benchmarks.harness import Run
from pipelines.config import LoaderConfig
from pipelines.ffcv import FFCVLoader
from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.loading import StreamedLoader, render
from pipelines.native import NativeLoader
from pipelines.order import EpochOrder
from pipelines.packed.beton_writer import PAGE_SIZE, data_start, finish
from pipelines.packed.files import find_file
from pipelines.packed.images import BetonImages, PackedImages
from pipelines.packed.table import Table, read_index, write_index
from pipelines.resident import ResidentLoader
from pipelines.sources import ArrayImages, DataConfig, FileImages, Images, Source
from pipelines.stored.trees import read_folder
from pipelines.subsets import stratified_draw
from pipelines.unchanged import data_fingerprint
from pipelines.views import PLANS

IMAGES = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
LISTED = (1024, 4096, 16_384, 65_536)  # real files: a million would take minutes to write
BATCH = 256
SOME = 4  # batches that are measured together
SIDE = 16  # of an image, pixels
BYTES = 3 * SIDE * SIDE
CLASSES = 100

EACH_ONCE = Expected(1, "every image is looked at once")
A_ROW_EACH = Expected(1, "a fixed number of bytes an image")
ALIKE = Expected(0, "a batch is looked up by position; the size of the table does not matter")
A_BATCH = Expected(0, "a batch is made, and given back")


def sparse_beton(path: Path, images: int) -> None:
    """A .beton of raw images, all black: tables as of any other, and a hole where the pixels would be."""
    a_page = PAGE_SIZE // BYTES
    rows = np.arange(images)
    first = -(-data_start(images, None) // PAGE_SIZE) * PAGE_SIZE
    offset = first + rows // a_page * PAGE_SIZE + rows % a_page * BYTES
    path.touch()
    finish(str(path), table_of(images, offset), int(offset[-1]) + BYTES)


def table_of(images: int, offset: np.ndarray) -> Table:
    side = np.full(images, SIDE, np.int32)
    rows, zeros = np.arange(images), np.zeros(images, np.int32)
    return Table(rows, rows % CLASSES, side, side, zeros, offset, np.full(images, BYTES), np.ones(images, bool))


def source_of(images: Images) -> Source:
    count, names = len(images), tuple(str(name) for name in range(CLASSES))
    rows = torch.arange(count)
    return Source("synthetic", "pretrain", images, rows % CLASSES, rows, names, SIDE, (0.5,) * 3, (0.25,) * 3)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="twinstream-growth-") as folder:
        yield Path(folder)


@contextmanager
def _beton(images: int) -> Iterator[Path]:
    with _folder() as folder:
        sparse_beton(folder / "set.beton", images)
        yield folder / "set.beton"


# ---- opening ---------------------------------------------------------------------------------------------


@contextmanager
def _open_beton(images: int) -> Iterator[Run]:
    with _beton(images) as path:
        yield lambda: BetonImages(path)


@contextmanager
def _open_index(images: int) -> Iterator[Run]:
    """Of shards: the bytes of the index are in memory, whence PackedImages takes its table and checks it."""
    with _folder() as folder:
        path = folder / "shard.tar"
        path.touch()
        with path.open("r+b") as file:
            file.truncate(images * BYTES)
        data, files = write_index(table_of(images, np.arange(images) * BYTES)), (find_file(path),)
        yield lambda: PackedImages(files, read_index(data, "index"), "webdataset")


@contextmanager
def _list_folder(images: int) -> Iterator[Run]:
    with _folder() as folder:
        for label in range(CLASSES):
            (folder / f"class-{label:03d}").mkdir()
        for image in range(images):
            (folder / f"class-{image % CLASSES:03d}" / f"image-{image:07d}.jpg").touch()
        config = DataConfig(source="folder", root=folder)
        yield lambda: read_folder(config, "train")


@contextmanager
def _split(images: int) -> Iterator[Run]:
    labels = np.arange(images) % CLASSES
    yield lambda: stratified_draw(labels, images // 10, 0, leave=1)


@contextmanager
def _fingerprint_packed(images: int) -> Iterator[Run]:
    with _beton(images) as path:
        opened = BetonImages(path)
        yield lambda: data_fingerprint(source_of(opened))


@contextmanager
def _fingerprint_array(images: int) -> Iterator[Run]:
    source = source_of(ArrayImages(np.zeros((images, SIDE, SIDE, 3), np.uint8)))
    yield lambda: data_fingerprint.__wrapped__(source)


@contextmanager
def _load_resident(images: int) -> Iterator[Run]:
    every, kept = ArrayImages(np.ones((images + images // 9, SIDE, SIDE, 3), np.uint8)), np.arange(images)
    source = source_of(every.select(kept))
    yield lambda: resident(source)


OPENING = [
    ("opened: a .beton's tables", _open_beton, EACH_ONCE, A_ROW_EACH, IMAGES),
    ("opened: an index of shards", _open_index, EACH_ONCE, A_ROW_EACH, IMAGES),
    ("opened: a folder of files", _list_folder, EACH_ONCE, A_ROW_EACH, LISTED),
    ("opened: a tenth held out", _split, EACH_ONCE, A_ROW_EACH, IMAGES),
    (
        "opened: fingerprint, packed",
        _fingerprint_packed,
        Expected(1, "where each image lies is hashed, once a run"),
        A_ROW_EACH,
        IMAGES,
    ),
    (
        "opened: fingerprint, an array",
        _fingerprint_array,
        Expected(0, "1,024 images stand for all"),
        Expected(0, "1,024 images stand for all"),
        IMAGES,
    ),
    (
        "opened: the resident loader",
        _load_resident,
        Expected(1, "every pixel is copied once"),
        Expected(1, "the pixels, without those that are held out, and beside the stored ones nothing else"),
        IMAGES,
    ),
]

# ---- an epoch, and its batches ---------------------------------------------------------------------------


def resident(source: Source) -> ResidentLoader:
    device = torch.device("cpu")
    return ResidentLoader(source, PLANS["simclr_cifar"], size=SIDE, batch_size=BATCH, seed=0, device=device)


def streamed(kind: type[StreamedLoader], images: Images) -> StreamedLoader:
    device, config = torch.device("cpu"), LoaderConfig(workers=1)
    plan = PLANS["simclr_cifar"]
    return kind(source_of(images), plan, size=SIDE, batch_size=BATCH, seed=0, device=device, config=config)


@contextmanager
def _order(images: int) -> Iterator[Run]:
    order = EpochOrder(images, BATCH, 0, name="synthetic")
    yield lambda: order.shares(1)


@contextmanager
def _quasi_random(images: int) -> Iterator[Run]:
    config = LoaderConfig(order="quasi_random")
    order = EpochOrder(images, BATCH, 0, name="synthetic", config=config, addresses=np.arange(images)[::-1])
    yield lambda: order.shares(1)


@contextmanager
def _first_batch(images: int) -> Iterator[Run]:
    with _beton(images) as path, closing(streamed(FFCVLoader, BetonImages(path, os_cache=False))) as loader:

        def run() -> None:
            with closing(loader.epoch(1)) as batches:  # type: ignore[type-var]
                next(batches)

        yield run


def _batches(loader: StreamedLoader) -> Iterator[Run]:
    """Some batches in the midst of an epoch: what `epoch` does but for drawing the order."""
    with closing(loader):
        shares = loader.order.shares(1)[:SOME]

        def run() -> None:
            with closing(loader.on_device(loader.crops(1, shares))) as batches:
                for batch in batches:
                    render(loader.source, loader.plan, batch.crops, batch.indices, seed=0, epoch=1)

        yield run


@contextmanager
def _packed_batches(images: int) -> Iterator[Run]:
    with _beton(images) as path:
        yield from _batches(streamed(FFCVLoader, BetonImages(path, os_cache=False)))


@contextmanager
def _file_batches(images: int) -> Iterator[Run]:
    """The same 256 JPEGs, over and over, each named as often as it takes."""
    with _folder() as folder:
        generator = np.random.default_rng(0)
        for image in range(BATCH):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{image:03d}.jpg")
        names = np.array([f"{image:03d}.jpg".encode() for image in range(BATCH)])
        yield from _batches(streamed(NativeLoader, FileImages(folder, np.tile(names, images // BATCH))))


@contextmanager
def _resident_batches(images: int) -> Iterator[Run]:
    loader = resident(source_of(ArrayImages(np.ones((images, SIDE, SIDE, 3), np.uint8))))
    shares = loader.order.shares(1)[:SOME]
    yield lambda: [loader.views(share, 1) for share in shares]


SORTED = Expected(1, "a key an image is sorted, once an epoch: n log n")


def cases() -> list[Case]:
    """Without those that read JPEGs where there is no compiler for their decoder."""
    found = [
        Case("data", name, "images", sizes, make, {"CPU s": time, "bytes": memory})
        for name, make, time, memory, sizes in OPENING
    ]
    for name, make in (("random", _order), ("quasi-random", _quasi_random)):
        found.append(
            Case("data", f"an epoch: {name} order", "images", IMAGES, make, {"CPU s": SORTED, "bytes": A_ROW_EACH})
        )
    if jpeg_decoder() is not None:
        name = "an epoch: its first batch"
        found.append(Case("data", name, "images", IMAGES, _first_batch, {"CPU s": SORTED, "bytes": A_ROW_EACH}))
    loaders = [("resident", _resident_batches)]
    if jpeg_decoder() is not None:
        loaders += [("files", _file_batches), ("a .beton", _packed_batches)]
    for name, make in loaders:
        expected = {"CPU s": ALIKE, "bytes": A_BATCH}
        found.append(Case("data", f"a batch: {name}", "images", IMAGES, make, expected, lambda _: SOME, settled=True))
    return found
