"""The .beton: FFCV reads ours, we read FFCV's, and what is damaged is named before it is believed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.packed import beton_writer
from pipelines.packed.beton import ALLOCATION, DESCRIPTOR, HEADER
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.images import BetonImages
from pipelines.sources import DataConfig, DataError, open_source
from pipelines.stored.images import ArrayImages
from tests.pipelines.packing import as_packed, multi_label, pack, photo_tree
from tests.pipelines.stored_sets import noise, write_tree

PIXELS = noise(7, 24, 32, 3)
LABELS = np.array([3, -1, 0, 2, 1, 1, 5])
ROWS = np.random.default_rng(1).integers(-1, 2, (7, 4)).astype(np.float32)

# What FFCV's library, not ours, makes of the files; its compiler is off.
SCRIPT = """
import sys, numpy as np, torch
from pathlib import Path
from ffcv.fields import BytesField, FloatField, IntField, NDArrayField, RGBImageField
from ffcv.fields.decoders import IntDecoder, NDArrayDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.libffcv import imdecode
from ffcv.reader import Reader
from ffcv.transforms import ToTensor
from ffcv.writer import DatasetWriter

folder, given, out = Path(sys.argv[1]), np.load(sys.argv[2]), {}
label = {'raw': IntDecoder, 'jpg': IntDecoder, 'multi': NDArrayDecoder}
for name, decoder in label.items():
    for cached in (True, False):
        pipelines = {'image': [SimpleRGBImageDecoder()], 'label': [decoder()], 'index': [IntDecoder()]}
        loader = Loader(str(folder / name / 'train.beton'), batch_size=2, num_workers=1, os_cache=cached, seed=0,
                        drop_last=False, order=OrderOption.SEQUENTIAL if cached else OrderOption.QUASI_RANDOM,
                        pipelines=pipelines)
        batches = [[np.array(x) for x in batch] for batch in loader]
        for place, field in enumerate(('image', 'label', 'index')):
            out[f'{name}.{cached}.{field}'] = np.concatenate([batch[place] for batch in batches])
files = sorted(Path(folder / 'tree').rglob('*.jpg'))
decoded = np.zeros((len(files), 24, 32, 3), np.uint8)
for path, target in zip(files, decoded):
    imdecode(np.fromfile(path, np.uint8), target, 24, 32, 24, 32)
out['decoded'] = decoded
reader = Reader(str(folder / 'raw' / 'train.beton'))
out['page_size'], out['names'] = reader.page_size, reader.field_names
np.savez(folder / 'read.npz', **out)

class Samples:
    def __init__(self, *columns): self.columns = columns
    def __len__(self): return len(self.columns[0])
    def __getitem__(self, row): return tuple(column[row] for column in self.columns)

pixels, labels, rows = given['pixels'], given['labels'], given['rows']
extra = [np.frombuffer(b'x' * (n + 1), np.uint8) for n in range(len(pixels))]
def write(name, fields, *columns):
    DatasetWriter(str(folder / name), fields, num_workers=2, page_size=1 << 21).from_indexed_dataset(
        Samples(*columns), chunksize=2)
write('plain.beton', {'image': RGBImageField('raw'), 'label': IntField()}, pixels, labels)
write('jpg.beton', {'image': RGBImageField('jpg', jpeg_quality=100), 'label': IntField()}, pixels, labels)
write('other.beton', {'weight': FloatField(), 'target': IntField(), 'note': BytesField(), 'pixels':
    RGBImageField('proportion'), 'label2': IntField()}, [0.5] * len(labels), labels, extra, pixels, labels + 1)
write('rows.beton', {'targets': NDArrayField(np.dtype('<f4'), (4,)), 'image': RGBImageField('raw')}, rows, pixels)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that we wrote, files that FFCV wrote, and what FFCV reads of ours."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    folder = tmp_path_factory.mktemp("beton")
    for row, pixels in enumerate(PIXELS):
        path = folder / "lossless" / f"c{row % 3}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    pack(DataConfig(source="folder", root=folder / "lossless"), folder / "raw", write_mode="raw")
    pack(photo_tree(folder / "tree", {"a": 4, "b": 3}, (24, 32)), folder / "jpg")
    convert(multi_label(ArrayImages(PIXELS), ROWS), folder / "multi", Options(write_mode="raw"), workers=0)
    np.savez(folder / "given.npz", pixels=PIXELS, labels=LABELS, rows=ROWS)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder / "given.npz")]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_ffcv_reads_what_we_write(folder: Path) -> None:
    read = np.load(folder / "read.npz")
    order = [0, 3, 6, 1, 4, 2, 5]  # as the class folders are listed
    assert np.array_equal(read["raw.True.image"], PIXELS[order])
    assert read["raw.True.label"].ravel().tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert np.array_equal(read["jpg.True.image"], read["decoded"])
    assert read["jpg.True.label"].ravel().tolist() == [0] * 4 + [1] * 3
    assert np.array_equal(read["multi.True.image"], PIXELS)
    assert np.array_equal(read["multi.True.label"], ROWS)
    for name, index in {"raw": range(7), "jpg": range(7), "multi": range(1, 22, 3)}.items():
        assert read[f"{name}.True.index"].ravel().tolist() == list(index)
        # Page by page, by FFCV's own cache: another order, the same samples.
        rows = np.argsort(read[f"{name}.False.index"].ravel())
        for field in ("image", "label", "index"):
            assert np.array_equal(read[f"{name}.False.{field}"][rows], read[f"{name}.True.{field}"])
    assert (read["page_size"], read["names"].tolist()) == (8 << 20, ["image", "label", "index"])


@pytest.mark.parametrize("os_cache", [True, False])
def test_we_read_what_ffcv_writes(folder: Path, os_cache: bool) -> None:
    for name in ("plain", "rows"):
        images = BetonImages(folder / f"{name}.beton", os_cache)
        assert np.array_equal(np.stack([images[row] for row in range(7)]), PIXELS)
        assert np.array_equal(images.table.index, np.arange(7))
    assert np.array_equal(images.table.label, ROWS)
    assert images.table.label.dtype == np.float32
    jpeg = BetonImages(folder / "jpg.beton", os_cache)
    assert jpeg.table.label.tolist() == LABELS.tolist()
    assert bytes(jpeg.read(0)[:2]) == b"\xff\xd8"
    assert jpeg[0].shape == (24, 32, 3)
    other = BetonImages(folder / "other.beton", os_cache)  # the first integer field, of any name
    assert other.table.label.tolist() == LABELS.tolist()
    for row in np.flatnonzero(other.table.raw):
        assert np.array_equal(other[row], PIXELS[row])


def test_a_map_is_read_without_a_copy(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "tree", {"a": 3})
    pack(config, tmp_path / "packed")
    mapped = BetonImages(tmp_path / "packed" / "train.beton")
    read = BetonImages(tmp_path / "packed" / "train.beton", os_cache=False)
    files = sorted((tmp_path / "tree" / "a").iterdir())
    for row, path in enumerate(files):
        assert mapped.read(row).tobytes() == read.read(row) == path.read_bytes()
    assert np.shares_memory(mapped.read(1), mapped.read(1))
    assert not mapped.read(1).flags.writeable
    assert read._maps == {}
    for os_cache in (True, False):
        source = open_source(as_packed(config, tmp_path / "packed").model_copy(update={"os_cache": os_cache}), "train")
        assert np.array_equal(source.images[0], mapped[0])
        assert isinstance(source.images.read(0), np.ndarray if os_cache else bytes)
        assert isinstance(source.select([1]).images, BetonImages)
    assert (np.diff(mapped.addresses) > 0).all()


def test_proportion_is_drawn_by_position(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", {"a": 200})
    config = DataConfig(source="folder", root=tmp_path / "tree", holdout=0.0)
    facts = pack(config, tmp_path / "packed", write_mode="proportion", raw_share=0.25).parts["train"]
    assert facts.encoded == 200 - facts.raw
    assert 30 <= facts.raw <= 70  # 50 on average; three deviations
    images = open_source(as_packed(config, tmp_path / "packed"), "train").images
    chosen = [row for row in range(200) if Options(write_mode="proportion", raw_share=0.25).raw(row)]
    assert np.flatnonzero(images.table.raw).tolist() == chosen
    original = open_source(config, "train").images
    assert all(np.array_equal(images[row], original[row]) for row in chosen)


def test_no_allocation_crosses_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_writer, "PAGE_SIZE", 64)
    lengths = [30, 30, 10, 64, 1, 200, 3, 300, 64]
    places = beton_writer.assign(17, lengths)
    size = max(beton_writer.page_of(length) for length in lengths)
    ends = [place + length for place, length in zip(places, lengths, strict=True)]
    assert all(end <= place for end, place in zip(ends, places[1:], strict=False))
    for page in (64, size):
        short = [(p, e) for p, e, n in zip(places, ends, lengths, strict=True) if n <= page]
        assert all(place // page == (end - 1) // page for place, end in short)


def _header(field: str, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        header = np.frombuffer(bytes(data[: HEADER.itemsize]), HEADER).copy()
        header[field] = value
        data[: HEADER.itemsize] = header.tobytes()

    return change


def _row(offset: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        start = HEADER.itemsize + 3 * DESCRIPTOR.itemsize + offset
        data[start : start + len(value)] = value

    return change


DAMAGE: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "version": (_header("version", 7), "starts with version 7"),
    "zeros": (lambda data: data.__setitem__(slice(0, 24), bytes(24)), "starts with version 0"),
    "empty": (lambda data: data.clear(), "0 bytes, too few"),
    "fields": (_header("fields", 65_535), "tells 65535 fields"),
    "samples": (_header("samples", 2**63), "tells 9,223,372,036,854,775,808 samples"),
    "no samples": (_header("samples", 0), "tells 0 samples"),
    "table": (_header("allocations", 2**64 - 1), "allocations at byte 18,446,744,073,709,551,615"),
    "page": (_header("page_size", 3), "pages of 3 bytes"),
    "cut": (lambda data: data.__delitem__(slice(-ALLOCATION.itemsize, None)), "has 4 allocations instead of 5"),
    "cut in a row": (lambda data: data.__delitem__(slice(-5, None)), "allocations instead of 5"),
    "half": (lambda data: data.__delitem__(slice(len(data) // 2, None)), "tells 5 samples"),
    "mode": (_row(0, b"\x09"), "sample 0 is stored in a way"),
    "raw": (_row(0, b"\x01"), "raw pixels that do not match"),
    "pointer": (_row(5, b"\x01"), "sample 0 points to byte"),
    "height": (_row(3, b"\0\0"), "has no pixels"),
    "index": (_row(24, b"\x02"), "is there twice"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_opening(kind: str, tmp_path: Path) -> None:
    pack(photo_tree(tmp_path / "tree", {"a": 5}), tmp_path / "packed")
    path = tmp_path / "packed" / "train.beton"
    change, message = DAMAGE[kind]
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        BetonImages(path)
    assert str(path) in str(caught.value)


def test_damaged_allocations_are_found(tmp_path: Path) -> None:
    pack(photo_tree(tmp_path / "tree", {"a": 5}), tmp_path / "packed")
    path = tmp_path / "packed" / "train.beton"
    whole = path.read_bytes()
    for field, value, message in (
        ("length", 2**64 - 1, "outside the data"),
        ("offset", 0, "outside the data"),
        ("length", 4_000, "overlaps"),
        ("sample", 3, "nothing was allocated for it"),
    ):
        allocations = np.frombuffer(whole[-5 * ALLOCATION.itemsize :], ALLOCATION).copy()
        allocations[field][2] = value
        path.write_bytes(whole[: -allocations.nbytes] + allocations.tobytes())
        with pytest.raises(DataError, match=message):
            BetonImages(path)
