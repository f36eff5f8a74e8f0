"""`python -m tools.convert PATH --verify`: what is damaged is found, in sets of ours and in files of others."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.packed.beton import HEADER
from pipelines.sources import DataConfig
from tests.pipelines.packing import pack, photo, photo_tree, run
from tests.pipelines.stored_sets import write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    photo_tree(tmp_path / "tree", {"a": 5, "b": 4})
    return tmp_path / "tree"


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    pack(DataConfig(source="folder", root=tree), tmp_path / "packed")
    return tmp_path / "packed"


def flip(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = at(data)
        return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]

    return change


def header(**values: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        told = np.frombuffer(data[: HEADER.itemsize], HEADER).copy()
        for name, value in values.items():
            told[name] = value
        return told.tobytes() + data[HEADER.itemsize :]

    return change


def early_end(data: bytes) -> bytes:
    """An end-of-image mark in the middle of the first scan."""
    place = data.index(b"\xff\xda") + 200
    return data[:place] + b"\xff\xd9" + data[place + 2 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(lambda data: data.index(b"\xff\xda") + 100), "its SHA-256 is not the manifest's"),
        (early_end, "SHA-256"),
        (lambda data: data[:-24], "by the manifest; it was cut off or replaced"),
        (header(version=9), "starts with version 9"),
        (header(samples=2**60), "tells 1,152,921,504,606,846,976 samples"),
        (header(fields=60_000), "tells 60000 fields"),
    ],
)
def test_verify_finds_damage_in_a_beton(change: Callable[[bytes], bytes], message: str, packed: Path) -> None:
    assert run(packed, "--verify").exit_code == 0
    path = packed / "train.beton"
    path.write_bytes(change(path.read_bytes()))
    result = run(packed, "--verify")
    assert result.exit_code == 1
    assert message in result.output


def test_verify_of_a_single_file(packed: Path, tree: Path, tmp_path: Path) -> None:
    """Of any writer: without a manifest there are no checksums, and the images have to speak for themselves."""
    path = packed / "train.beton"
    whole = path.read_bytes()
    assert run(path, "--verify").exit_code == 0
    cases: list[tuple[bytes, str]] = [(whole[:-24], "has 8 allocations instead of 9"), (b"", "too few for a header")]
    if jpeg_decoder() is not None:
        cases.append((early_end(whole), "image 0 in "))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(30, 70).save(file, format="JPEG", exif=exif, quality=20)
    place, first = whole.index(b"\xff\xd8"), len((tree / "a" / "0.jpg").read_bytes())
    lying = file.getvalue()
    assert len(lying) <= first
    cases.append((whole[:place] + lying + bytes(first - len(lying)) + whole[place + first :], "pixels, and 30 x 70"))
    for data, message in cases:
        path.write_bytes(data)
        result = run(path, "--verify")
        assert result.exit_code == 1
        assert message in result.output
    for to, ending in (("webdataset", "tar"), ("tfrecord", "tfrecord")):
        pack(DataConfig(source="folder", root=tree), tmp_path / to, to=to)
        shard = tmp_path / to / f"train-00000.{ending}"
        assert run(shard, "--verify").exit_code == 0
        shard.write_bytes(shard.read_bytes()[:-1_100])
        result = run(shard, "--verify")
        assert result.exit_code == 1
        assert "cut off" in result.output
    assert run(tmp_path / "nothing.tar", "--verify").exit_code == 2


@pytest.mark.parametrize("to", ["webdataset", "tfrecord"])
def test_verify_finds_damage_in_shards(to: str, tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(DataConfig(source="folder", root=tree), folder, to=to)
    index, beside = folder / "train.index.npz", folder / "train-00000.idx"
    shard = folder / f"train-00000.{'tar' if to == 'webdataset' else 'tfrecord'}"
    arrays = dict(np.load(index))
    for path, data, message in (
        (shard, shard.read_bytes()[:-1], "it was cut off or replaced"),
        (shard, flip(lambda data: len(data) // 2)(shard.read_bytes()), "SHA-256"),
        (beside, beside.read_bytes()[:-3] + b"9\n", "not an index of"),
        (index, {**arrays, "label": arrays["label"][::-1]}, "label is not what "),
        (index, {**arrays, "height": arrays["height"] + 1}, "by the table"),
    ):
        assert run(folder, "--verify").exit_code == 0
        before = path.read_bytes()
        if isinstance(data, dict):
            np.savez(path, **data)
        else:
            path.write_bytes(data)
        result = run(folder, "--verify")
        assert result.exit_code == 1
        assert message in result.output, result.output
        path.write_bytes(before)


@pytest.mark.parametrize("to", ["ffcv", "webdataset"])
def test_verify_compares_the_manifests_figures(to: str, tree: Path, tmp_path: Path) -> None:
    manifest = pack(DataConfig(source="folder", root=tree), tmp_path / "packed", to=to)
    part = manifest.parts["train"]
    (shard,) = part.shards
    counts = part.class_counts
    assert counts is not None
    for name, value, message in (
        ("kept", part.kept - 1, "kept + encoded + raw: 8, and 9 by the tables"),
        ("shards", (shard.model_copy(update={"samples": 8}),), "samples of the files: [8], and [9]"),
        ("height", part.height.model_copy(update={"max": 999}), "least, median and largest height"),
        ("width", part.width.model_copy(update={"median": 3.0}), "least, median and largest width"),
        ("class_counts", (counts[0] + 1, counts[1]), "class_counts: ["),
    ):
        wrong = manifest.model_copy(update={"parts": {"train": part.model_copy(update={name: value})}})
        (tmp_path / "packed" / "manifest.json").write_text(wrong.dumps())  # by who knows the checksum
        result = run(tmp_path / "packed", "--verify")
        assert result.exit_code == 1
        assert message in result.output, result.output


def test_verify_lists_the_first_twenty(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", {"a": 60})
    pack(DataConfig(source="folder", root=tmp_path / "tree"), tmp_path / "packed", to="tfrecord")
    index = tmp_path / "packed" / "train.index.npz"
    arrays = dict(np.load(index))
    np.savez(index, **{**arrays, "width": arrays["width"] + (np.arange(60) < 50)})
    result = run(tmp_path / "packed", "--verify")
    assert result.exit_code == 1
    assert result.output.count("by the table\n") == 18
    assert "width is not what" in result.output
    assert "largest width: (10, 10.0, 10), and (10, 11.0, 11) by the tables" in result.output
    assert "and 32 more" in result.output
