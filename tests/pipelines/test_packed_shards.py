"""Tar and TFRecord shards: DALI and webdataset read ours, their tools' indices are ours, damage is named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.packed import files
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.files import find_file, read_whole
from pipelines.packed.images import PackedImages
from pipelines.packed.opening import open_images
from pipelines.packed.scanning import scan_shards
from pipelines.packed.table import DTYPES, read_index, write_index
from pipelines.packed.tfrecord import parse_example, write_example
from pipelines.sources import DataConfig, DataError, open_source
from pipelines.stored.images import ArrayImages
from tests.pipelines.packing import as_packed, multi_label, pack, photo_tree
from tests.pipelines.stored_sets import noise

ENDINGS = {"webdataset": ".tar", "tfrecord": ".tfrecord"}
BIN = Path(sys.executable).parent


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return photo_tree(tmp_path / "tree", {"a": 5, "b": 4})


def shards(folder: Path, to: str) -> list[Path]:
    return sorted(folder.glob(f"train-*{ENDINGS[to]}"))


def pack_in_three(config: DataConfig, destination: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr("pipelines.packed.conversion._mean_bytes", lambda *args: (1 << 20) // 3)  # 3 of 9 a shard
    pack(config, destination, to=to, shard_mb=1)
    found = shards(destination, to)
    assert len(found) == 3
    return found


@pytest.mark.parametrize("to", ENDINGS)
def test_dali_reads_what_we_write(to: str, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dali = pytest.importorskip("nvidia.dali")
    fn = dali.fn
    found = pack_in_three(config, tmp_path / "packed", to, monkeypatch)
    paths, indices = [str(path) for path in found], [str(path.with_suffix(".idx")) for path in found]

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        if to == "webdataset":
            ext = ["jpg", "cls", "index"]
            read = fn.readers.webdataset(paths=paths, index_paths=indices, ext=ext, missing_component_behavior="error")
            return tuple(read)
        from nvidia.dali import tfrecord

        names = ("image/class/label", "index", "image/height", "image/width")
        features = {name: tfrecord.FixedLenFeature([1], tfrecord.int64, -7) for name in names}
        features["image/encoded"] = tfrecord.FixedLenFeature((), tfrecord.string, "")
        read = fn.readers.tfrecord(path=paths, index_path=indices, features=features)
        return read["image/encoded"], *(read[name] for name in names)

    original = open_source(config, "train")
    pipe = pipeline()
    pipe.build()
    seen = []
    for _ in range(9):
        data, label, index, *size = (np.array(out[0]) for out in pipe.run())
        if to == "webdataset":
            label, index = (np.array([int(text.tobytes())]) for text in (label, index))
        seen.append(index.item())
        assert data.tobytes() == original.images.read(seen[-1])
        assert label.item() == int(original.labels[seen[-1]])
        if size:
            assert tuple(side.item() for side in size) == original.images[seen[-1]].shape[:2]
    assert sorted(seen) == list(range(9))
    assert seen != sorted(seen)  # shuffled beforehand: DALI shuffles in a buffer only


def test_webdataset_reads_what_we_write(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    webdataset = pytest.importorskip("webdataset")
    found = pack_in_three(config, tmp_path / "packed", "webdataset", monkeypatch)
    original = open_source(config, "train")
    samples = list(webdataset.WebDataset([str(path) for path in found], shardshuffle=False).decode("rgb8"))
    for sample in samples:
        index = int(sample["index"])
        assert sample["__key__"] == f"{index:09d}"
        assert sample["cls"] == int(original.labels[index])
        assert np.array_equal(sample["jpg"], original.images[index])
    assert sorted(int(sample["index"]) for sample in samples) == list(range(9))


@pytest.mark.parametrize(("to", "tool"), [("webdataset", "wds2idx"), ("tfrecord", "tfrecord2idx")])
def test_the_index_is_that_of_dalis_tool(
    to: str, tool: str, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("nvidia") is None or not (BIN / tool).exists():
        pytest.skip(f"DALI's {tool} is not installed")
    for path in pack_in_three(config, tmp_path / "packed", to, monkeypatch):
        subprocess.run([sys.executable, BIN / tool, path, tmp_path / "theirs"], check=True, capture_output=True)
        assert path.with_suffix(".idx").read_text() == (tmp_path / "theirs").read_text()


@pytest.mark.parametrize("to", ENDINGS)
def test_a_lost_index_is_made_again(
    to: str, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_in_three(config, tmp_path / "packed", to, monkeypatch)
    index = tmp_path / "packed" / "train.index.npz"
    before, again = index.read_bytes(), as_packed(config, tmp_path / "packed")
    index.unlink()
    source, original = open_source(again, "train"), open_source(config, "train")
    assert index.read_bytes() == before
    for row in (8, 0, 4):
        assert source.images.read(row) == original.images.read(row)
        assert np.array_equal(source.images[row], original.images[row])


@pytest.mark.parametrize("to", ENDINGS)
def test_several_labels_and_pixels_come_back_bit_for_bit(to: str, tmp_path: Path) -> None:
    pixels = noise(11, 9, 7, 3)
    labels = np.random.default_rng(0).integers(-1, 2, (11, 6)).astype(np.float32)
    source = multi_label(ArrayImages(pixels), labels)
    manifest = convert(source, tmp_path, Options(to=to, write_mode="raw"), workers=0).manifest  # type: ignore[arg-type]
    for rescanned in (False, True):
        images = open_images(str(tmp_path), manifest, "train")
        assert images.table.label.dtype == np.float32
        assert np.array_equal(images.table.label, labels)
        assert images.table.index.tolist() == list(range(1, 34, 3))
        assert np.array_equal(np.stack([images[row] for row in range(11)]), pixels)
        assert images.size == (9, 7)
        if not rescanned:
            (tmp_path / "train.index.npz").unlink()


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    """As tar itself and Python's tarfile write them, with long names, folders and files of no interest."""
    folder = tmp_path / ("long" * 30) / "in.side"
    folder.mkdir(parents=True)
    for place in range(3):
        Image.fromarray(noise(8, 9 + place, 3)).save(folder / f"{place}.seg.png")
        (folder / f"{place}.png").write_bytes((folder / f"{place}.seg.png").read_bytes())
        (folder / f"{place}.cls").write_text(f"{place + 4}\n")
    (folder / ".hidden").write_text("x")
    path = tmp_path / "theirs.tar"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(path, "w", format=format) as archive:
            archive.add(tmp_path / ("long" * 30), arcname="x" * 90 + "/" + "y" * (120 if format else 40))
        file = find_file(path)
        table, _ = scan_shards([file], "webdataset")
        order = np.argsort(table.label)
        assert table.label[order].tolist() == [4, 5, 6]
        assert table.width[order].tolist() == [9, 10, 11]
        images = PackedImages((file,), table, "webdataset").select(order)
        assert np.array_equal(images[1], noise(8, 10, 3))


@pytest.mark.parametrize("to", ENDINGS)
def test_damaged_shards_are_named(to: str, config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "packed", to=to)
    (path,) = shards(tmp_path / "packed", to)
    whole, again = path.read_bytes(), as_packed(config, tmp_path / "packed")
    path.write_bytes(whole[:-600])
    with pytest.raises(DataError, match=r"by the manifest; it was cut off") as caught:
        open_source(again, "train")
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cut off"):
        scan_shards([find_file(path)], to)  # type: ignore[arg-type]
    path.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(DataError, match=r"checksum|cut off|no tar header"):
        scan_shards([find_file(path)], to)  # type: ignore[arg-type]
    path.unlink()
    with pytest.raises(DataError, match="cannot open"):
        open_source(again, "train")


def test_a_damaged_index_is_named(config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "packed", to="tfrecord")
    path = tmp_path / "packed" / "train.index.npz"
    table, again = read_index(path.read_bytes(), "it"), as_packed(config, tmp_path / "packed")
    data = write_index(table)
    header = data.index(b"'shape': (9,)")
    for wrong, message in (
        (data[:-40], "not an index"),
        (b"", "not an index"),
        (data[:header] + b"'shape': (9" + b"0" * 15 + b",)" + data[header + 28 :], "not an index"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            open_source(again, "train")
    for name, value, message in (
        ("offset", 10**12, "beyond the end"),
        ("offset", 2**63 - 1, "beyond the end"),
        ("length", -4, "no bytes"),
        ("shard", 7, "not listed"),
        ("height", 0, "no pixels"),
        ("label", 2, "labels from 0 to 2"),
        ("index", 3, "twice"),
    ):
        arrays = {key: getattr(table, key).copy() for key in DTYPES}
        arrays[name][4] = value
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            open_source(again, "train")
    np.savez(path, **{key: getattr(table, key).astype(np.float64) for key in DTYPES})
    with pytest.raises(DataError, match="index is float64"):
        open_source(again, "train")


def example_class() -> Any:
    """tf.train.Example, by Google's protobuf (which TensorBoard brings) instead of our code."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    repeated, single = 3, 1
    for name, fields in {
        "BytesList": [("value", 1, 12, repeated, "")],
        "FloatList": [("value", 1, 2, repeated, "")],
        "Int64List": [("value", 1, 3, repeated, "")],
        "Feature": [(f"{n}_list", i, 11, single, f".t.{n.title()}List") for i, n in enumerate(_KINDS, 1)],
        "Entry": [("key", 1, 9, single, ""), ("value", 2, 11, single, ".t.Feature")],
        "Features": [("feature", 1, 11, repeated, ".t.Entry")],
        "Example": [("features", 1, 11, single, ".t.Features")],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, type_name in fields:
            message.field.add(name=field, number=number, type=kind, label=label, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


_KINDS = ("bytes", "float", "int64")


def test_examples_are_those_of_protobuf() -> None:
    pytest.importorskip("google.protobuf")
    theirs = example_class()()
    for key, kind, values in (("a", 0, [b"xy"]), ("f", 1, [1.5, -2.0]), ("n", 2, [3, -1, 300])):
        entry = theirs.features.feature.add(key=key)
        getattr(entry.value, f"{_KINDS[kind]}_list").value.extend(values)
    message = write_example({"a": b"xy", "f": [1.5, -2.0], "n": [3, -1, 300]})
    assert message == theirs.SerializeToString()
    found = parse_example(message)
    assert {key: value for key, (value, _) in found.items()} == {"a": b"xy", "f": [1.5, -2.0], "n": [3, -1, 300]}
    place = found["a"][1]
    assert message[place : place + 2] == b"xy"
    unpacked = bytes.fromhex("0a100a0e0a016e1209" + "1a07" + "0803" + "0805" + "08ac02")
    theirs.ParseFromString(unpacked)  # numbers one by one, as proto2 writes them
    assert parse_example(unpacked)["n"][0] == list(theirs.features.feature[0].value.int64_list.value) == [3, 5, 300]
    for end in range(1, len(message)):
        with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
            parse_example(message[:end])


def test_reading_goes_on_in_other_processes_and_stops_when_files_change(config: DataConfig, tmp_path: Path) -> None:
    import multiprocessing
    import pickle

    pack(config, tmp_path / "packed", to="webdataset")
    images = open_source(as_packed(config, tmp_path / "packed"), "train").images
    expected = [images.read(row) for row in range(9)]
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.read(row) for row in range(9)] == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(images.read, range(9)) == expected
    (path,) = shards(tmp_path / "packed", "webdataset")
    path.rename(path.with_suffix(".old"))
    path.write_bytes(read_whole(str(path.with_suffix(".old")))[::-1])
    fresh = pickle.loads(pickle.dumps(images))
    assert fresh.read(0) == expected[0]  # the file that is open is still the old one
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(DataError, match=r"was changed, cut off or replaced"),
    ):
        pool.map(images.read, [0])


def test_threads_share_few_open_files(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_in_three(config, tmp_path / "packed", "tfrecord", monkeypatch)
    images = open_source(as_packed(config, tmp_path / "packed"), "train").images
    expected = [images.read(row) for row in range(9)]
    pool = files._OpenFiles(limit=1)
    monkeypatch.setattr(files, "_POOL", pool)
    order = np.random.default_rng(0).integers(0, 9, 2_000).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert all(data == expected[row] for row, data in zip(order, threads.map(images.read, order), strict=True))
    assert len(pool._entries) <= 8
    assert all(users == 0 for _, users in pool._entries.values())
