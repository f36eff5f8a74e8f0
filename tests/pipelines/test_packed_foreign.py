"""Shards of strangers, or damaged ones: every oddity is a defect that names the file, never a traceback."""

from __future__ import annotations

import io
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.packed.conversion import PartSource, SetSource, convert
from pipelines.packed.encode import Options
from pipelines.packed.table import DTYPES, read_index
from pipelines.packed.tfrecord import write_example
from pipelines.packed.verify import verify
from pipelines.sources import DataConfig
from pipelines.stored.images import ArrayImages, DataError
from tests.pipelines.packing import pack, photo_tree


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, format="JPEG")
    return file.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    return path


def write_records(path: Path, *examples: dict[str, Any]) -> Path:
    google_crc32c = pytest.importorskip("google_crc32c")

    def checked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return data + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    messages = [write_example(example) for example in examples]
    path.write_bytes(b"".join(checked(struct.pack("<Q", len(m))) + checked(m) for m in messages))
    return path


def defect(path: Path) -> str:
    ((one,),) = [found.defects for found in verify(str(path), workers=0)]
    assert one.startswith(f"{path}: ")
    return one


@pytest.mark.parametrize(
    ("ending", "data", "message"),
    [
        ("cls", b"[" * 100_000, "100,000 bytes"),
        ("cls", b"[" * 60_000, "lists within lists"),
        ("cls", b"[null]", "a label of None"),
        ("cls", b"[[1]]", r"a label of \[1\]"),
        ("cls", b"[{}]", "a label of {}"),
        ("cls", b"[true]", "a label of True"),
        ("cls", b"[1e400]", "a label of inf"),
        ("cls", b"[" + b"9" * 400 + b"]", "a label of 999"),
        ("cls", b"[NaN]", "a label of nan"),
        ("cls", b"9" * 5_000, "expected a whole number"),
        ("cls", b"9" * 30, "expected a whole number"),
        ("cls", b"1_0", "expected a whole number"),
        ("cls", b"-7", "a label of -7"),
        ("index", b"9" * 30, "expected a whole number"),
        ("index", b"-3", "negative position"),
        ("index", b"1" * 2_000, "2,000 bytes"),
    ],
)
def test_odd_labels_and_positions_in_a_tar(ending: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", ("0.jpg", jpeg()), (f"0.{ending}", data))
    assert re.search(message, defect(path))


def test_a_sample_is_in_a_tar_once(tmp_path: Path) -> None:
    image, path = jpeg(), tmp_path / "x.tar"
    apart = ("0.jpg", image), ("1.jpg", image), ("0.cls", b"1"), ("1.cls", b"2")
    assert "sample 0 is there twice" in defect(write_tar(path, *apart))
    assert "sample 0 has .jpg twice" in defect(write_tar(path, ("0.jpg", image), ("0.jpg", image)))
    assert "sample 0 has .JPG twice" in defect(write_tar(path, ("0.jpg", image), ("0.JPG", image)))


def test_zeros_inside_a_tar_do_not_end_it(tmp_path: Path) -> None:
    """GNU tar itself stops there, with a warning: the images behind would be gone without a word."""
    path = write_tar(tmp_path / "x.tar", *((f"{place}.jpg", jpeg()) for place in range(3)))
    whole = path.read_bytes()
    second = whole.index(b"1.jpg")
    for zeros in (512, 1_024):
        path.write_bytes(whole[:second] + bytes(zeros) + whole[second + zeros :])
        behind = second + zeros + next(i for i, byte in enumerate(whole[second + zeros :]) if byte)
        assert f"zeros from byte {second:,} on, where a tar would end, but data at byte {behind:,}" in defect(path)
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    path.write_bytes(whole[:end] + bytes(512))
    assert f"one block of zeros, at byte {end:,}, instead of two" in defect(path)
    path.write_bytes(whole[:end] + bytes(1_024))
    assert [found.defects for found in verify(str(path), workers=0)] == [[]]


def test_pax_headers_tell_sizes_and_may_be_nonsense(tmp_path: Path) -> None:
    def entry(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
        facts = tarfile.TarInfo(name)
        facts.type, facts.size = kind, len(data) if size is None else size
        return facts.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)

    image, path = jpeg(), tmp_path / "x.tar"
    record = f"size={len(image)}\n"
    record = f"{len(record) + 3} {record}"
    for told, size in ((record.encode(), 0), (b"9" * 5_000, None), (b"-5 path=x\n", None)):
        path.write_bytes(entry("pax", told, tarfile.XHDTYPE) + entry("0.jpg", image, size=size) + bytes(1_024))
        (found,) = verify(str(path), workers=0)
        assert (found.images, found.defects) == (1, [])
    path.write_bytes(entry("pax", bytes(1 << 17), tarfile.XHDTYPE) + entry("0.jpg", image) + bytes(1_024))
    assert "a header of 131,072 bytes" in defect(path)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image/height": [2**40], "image/width": [1]}, "image/height is [1099511627776]"),
        ({"image/height": [-5], "image/width": [1]}, "image/height is [-5]"),
        ({"image/height": [20], "image/width": [1.5]}, "image/width is [1.5]"),
        ({"image/height": b"20", "image/width": [20]}, "image/height is b'20'"),
        ({"image/class/label": [-5]}, "a label of -5"),
        ({"image/class/label": b"cat"}, "is the text b'cat'"),
        ({"image/class/label": [float("nan")]}, "a label of nan"),
        ({"image/class/label": [0.0, float("inf")]}, "a label of inf"),
        ({"index": [-3]}, "index is [-3]"),
        ({"index": [float("inf")]}, "index is [inf]"),
        ({"pixels": [0] * (1 << 20 | 1)}, "more than 1,048,576 numbers"),
        ({"image/encoded": [3]}, "no image/encoded"),
    ],
)
def test_odd_features_in_a_tfrecord(features: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in defect(write_records(tmp_path / "x.tfrecord", {"image/encoded": jpeg(), **features}))


def test_names_tell_the_kind_unless_there_is_a_manifest(tmp_path: Path) -> None:
    for name in ("set.tfrecord-00000-of-01024", "train-00000-of-01024", "tfrecord_3"):
        path = write_records(tmp_path / name, {"image/encoded": jpeg(), "image/class/label": [4]})
        (found,) = verify(str(path), workers=0)
        assert (found.images, found.defects) == (1, [])
    photo_tree(tmp_path / "tree", {"a": 2, "b": 2})
    pack(DataConfig(source="folder", root=tmp_path / "tree"), tmp_path / "set.beton")
    (found,) = verify(str(tmp_path / "set.beton"), workers=0)
    assert (found.name, found.images, found.defects) == ("train", 4, [])


def test_an_index_of_nonsense_is_refused() -> None:
    whole = {name: np.ones(3, dtype) for name, dtype in DTYPES.items()}
    for label in (np.int64(3), np.ones((3, 2, 2), np.float32)):
        file = io.BytesIO()
        np.savez(file, **{**whole, "label": label})
        with pytest.raises(DataError, match="expected one or two axes"):
            read_index(file.getvalue(), "it")


@pytest.mark.parametrize("label", [np.array([0, -5]), np.array([[0, 1], [1, np.nan]], np.float32)])
def test_odd_labels_in_a_beton(label: np.ndarray, tmp_path: Path) -> None:
    images = ArrayImages(np.zeros((2, 8, 8, 3), np.uint8))
    part = PartSource("train", images, label, np.arange(2), None)
    convert(SetSource("folder", ("a", "b"), (part,), None), tmp_path, Options(), workers=0)
    ((one,),) = [found.defects for found in verify(str(tmp_path / "train.beton"), workers=0)]
    assert f"image 1 in {tmp_path / 'train.beton'} has the label {label[1]}" in one
