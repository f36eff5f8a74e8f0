"""Packed sets of strangers, damaged or made to harm: every image is given, or a DataError says what is wrong."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pipelines.foreign import MOST_MESSAGE
from pipelines.packed import tfrecord
from pipelines.packed.files import find_file
from pipelines.packed.images import BetonImages, PackedImages
from pipelines.packed.journal import FOLDER, Journal
from pipelines.packed.manifest import _checksum
from pipelines.packed.scanning import scan_shards
from pipelines.packed.table import Table, check_table, read_index
from pipelines.packed.verify import verify
from pipelines.sources import DataConfig, DataError, open_source
from tests.fuzz.test_bad_recipes import VALUES
from tests.fuzz.trials import trials, try_all, try_mutations, with_memory
from tests.pipelines.packing import FORMATS, pack, photo_tree, run

ENDINGS = {"ffcv": ".beton", "webdataset": ".tar", "tfrecord": ".tfrecord"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    config = photo_tree(root / "photos", {"a": 2, "b": 2}, sides=(24, 20))
    for kind in FORMATS:
        pack(config, root / kind, to=kind)
    pack(config, root / "raw", to="ffcv", write_mode="raw")
    return {name: root / name for name in (*FORMATS, "raw")}


def read_all(images: PackedImages) -> int:
    """How many images are given; the others are refused one by one, which a run would stop at."""
    check_table(images.table, [file.size for file in images.files], "it")
    given = 0
    for row in range(len(images)):
        try:
            given += images[row].dtype == np.uint8
        except DataError as error:
            readable(error)
    return given


def readable(error: ValueError) -> None:
    text = str(error)
    assert 0 < len(text) <= MOST_MESSAGE
    assert text.isprintable(), repr(text)


@pytest.mark.parametrize("name", ["ffcv", "raw", "webdataset", "tfrecord"])
@trials(quick=150, many=20_000)
def test_a_mutated_file_is_read_or_refused(
    name: str, count: int, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = "ffcv" if name == "raw" else name
    seeds = [path.read_bytes() for path in sorted(packed[name].glob(f"*{ENDINGS[kind]}"))]
    path = tmp_path / f"x{ENDINGS[kind]}"
    checked = True
    if kind == "tfrecord":  # or hardly any would come to the parser behind the checksums
        own = tfrecord._checksum
        monkeypatch.setattr(tfrecord, "_checksum", lambda data: own(data) if checked else Anything())

    def check(data: bytes) -> int | None:
        nonlocal checked
        checked = len(data) % 4 == 0
        path.write_bytes(data)
        try:
            if kind == "ffcv":
                return read_all(BetonImages(path, os_cache=bool(len(data) % 2)))
            file = find_file(path)
            return read_all(PackedImages((file,), scan_shards((file,), kind)[0], kind))
        except DataError as error:
            readable(error)
            return None

    assert try_mutations(check, seeds, count) > 0


class Anything(bytes):
    """A checksum that every other one equals."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


@trials(quick=300, many=30_000)
def test_a_mutated_index_is_read_or_refused(count: int, packed: dict[str, Path]) -> None:
    seeds = [(packed["webdataset"] / "train.index.npz").read_bytes()]

    def check(data: bytes) -> Table | None:
        try:
            table = read_index(data, "it")
            check_table(table, [1 << 20], "it")
        except DataError as error:
            readable(error)
            return None
        return table

    try_mutations(check, seeds, count)


@trials(quick=150, many=10_000)
def test_any_value_may_be_in_a_manifest(count: int, packed: dict[str, Path], tmp_path: Path) -> None:
    """With the right checksum: it protects from accidents, not from strangers."""
    content = json.loads((packed["webdataset"] / "manifest.json").read_text())
    content.pop("checksum")
    for file in packed["webdataset"].iterdir():
        os.symlink(file, tmp_path / file.name)
    (tmp_path / "manifest.json").unlink()
    places = list(places_in(content))

    def check(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        changed = json.loads(json.dumps(content))
        for (*above, last), value in changes:
            section = changed
            try:
                for key in above:
                    section = section[key]
                section[last] = value
            except (TypeError, LookupError):
                continue  # an earlier change took it away
        text = json.dumps(changed, default=str)
        changed = json.loads(text)
        (tmp_path / "manifest.json").write_text(json.dumps({**changed, "checksum": _checksum(changed)}))
        config = DataConfig(source="folder", root=tmp_path)
        try:
            source = open_source(config, "train")
            assert source.images[0].dtype == np.uint8
            assert min(source.std) > 0
            assert 0 < source.image_size < 1 << 16
        except DataError as error:
            readable(error)

    try_all(check, st.lists(st.tuples(st.sampled_from(places), VALUES), min_size=1, max_size=2), count)


def places_in(content: Any) -> Any:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *below) for below in places_in(value))


@trials(quick=150, many=10_000)
def test_a_mutated_journal_is_read_or_refused(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "to" / FOLDER
    folder.mkdir(parents=True)
    plan = json.dumps({"identity": {"to": "ffcv"}, "settings": {"train": 4, "bytes": 100}})
    rows = {name: [1, 2] for name in ("index", "height", "width", "raw", "offset", "length")}
    shard = {"name": "train-00000.tar", "samples": 2, "bytes": 9, "sha256": "0"}
    entry = {"part": "train", "chunk": 0, "rows": rows, "shard": shard, "encodings": {"kept": 2}}
    line = json.dumps({**entry, "sums": [[0.5, 0.5, 0.5]] * 2, "skipped": []})

    def check(data: bytes) -> Journal | None:
        first, _, rest = data.partition(b"\n")
        (folder / "plan.json").write_bytes(first)
        (folder / "journal.jsonl").write_bytes(rest)
        try:
            journal = Journal(tmp_path / "to", {"to": "ffcv"})
        except DataError as error:
            readable(error)
            return None
        journal.close()
        assert all(entry["part"] in ("train", "test") for entry in journal.entries)
        return journal

    assert try_mutations(check, [f"{plan}\n{line}\n{line}\n".encode()], count) > 0


# ---- made to harm --------------------------------------------------------------------------------------


def tar_of(*members: tuple[str, bytes, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, data in members:
            facts = tarfile.TarInfo(name)
            facts.type, facts.size, facts.linkname = kind, len(data), link
            archive.addfile(facts, io.BytesIO(data))
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("../0.jpg", tarfile.REGTYPE, "lies outside"),
        ("a/../../0.jpg", tarfile.REGTYPE, "lies outside"),
        ("/etc/0.jpg", tarfile.REGTYPE, "lies outside"),
        ("0.jpg", tarfile.SYMTYPE, "is a link"),
        ("0.jpg", tarfile.LNKTYPE, "is a link"),
        ("0.jpg", tarfile.CHRTYPE, "is a link, a device"),
        ("0.jpg", tarfile.FIFOTYPE, "is a link, a device"),
        ("0.jpg", tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_a_tar_keeps_to_its_folder(name: str, kind: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = jpeg() if kind == tarfile.REGTYPE else b""
    path.write_bytes(tar_of((name, kind, data), link="../../etc/passwd"))
    (found,) = verify(str(path), workers=0)
    assert reason in found.defects[0]


def test_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(("a", tarfile.DIRTYPE, b""), ("./a/..b.jpg", tarfile.REGTYPE, jpeg())))
    (found,) = verify(str(path), workers=0)
    assert (found.images, found.defects) == (0, [f"{path}: holds no samples"])
    path.write_bytes(tar_of(("a", tarfile.DIRTYPE, b""), ("./a/b..c.jpg", tarfile.REGTYPE, jpeg())))
    (found,) = verify(str(path), workers=0)
    assert "no image" in found.defects[0]


def beton(samples: int, size: int, end: int) -> Callable[[Path], None]:
    """A header that promises; the rest of the file is a hole."""

    def write(path: Path) -> None:
        from pipelines.packed.beton import DESCRIPTOR, HEADER, IMAGE

        header = np.array((2, 1, 1 << 21, samples, end), HEADER)
        field = np.zeros((), DESCRIPTOR)
        field["type"], field["name"] = IMAGE, b"image"
        path.write_bytes(header.tobytes() + field.tobytes())
        os.truncate(path, size)

    return write


def records(lengths: list[int], size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            for length in lengths:
                head = struct.pack("<Q", length)
                file.write(head + tfrecord._checksum(head))
            file.truncate(size)

    return write


def message(features: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        head = struct.pack("<Q", len(features))
        path.write_bytes(b"".join([head, tfrecord._checksum(head), features, tfrecord._checksum(features)]))

    return write


def hole_in_a_tar(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        facts = tarfile.TarInfo(name)
        facts.size = 1 << 40
        path.write_bytes(facts.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, (1 << 40) + 512 + 1024)

    return write


@pytest.mark.parametrize(
    ("ending", "write", "reason"),
    [
        (".beton", beton(2**63, 10_000, 5_000), "tells 9,223,372,036,854,775,808 samples"),
        (".beton", beton(10**9, 1 << 40, 1 << 39), "allocations instead of"),
        (".tfrecord", records([1 << 38], 1 << 39), "more than 1,073,741,824"),
        (".tfrecord", records([2**64 - 1], 10_000), "the shard was cut off"),
        (".tfrecord", message(b"\x0a\x00" * 1_000_000), "more than 65,536 fields"),
        (".tfrecord", message(b"\x08\x00" * 1_000_000), "more than 65,536 fields"),
        (".tfrecord", message(tfrecord.write_example({f"{n}": [1] * 100_000 for n in range(20)})), "numbers in lists"),
        (".tar", hole_in_a_tar("0.cls"), "has no image"),
        (".tar", hole_in_a_tar("0.jpg"), "has 1,099,511,627,776 bytes"),
    ],
)
def test_what_a_file_promises_takes_no_memory(
    ending: str, write: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{ending}"
    write(path)
    said = with_memory(600, lambda: verify(str(path), workers=0)[0].defects)
    assert reason in said, said


def test_a_large_manifest_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    photo_tree(tmp_path, {"a": 2})
    (tmp_path / "manifest.json").write_text("{}")
    os.truncate(tmp_path / "manifest.json", 1 << 36)
    config = DataConfig(source="folder", root=tmp_path, holdout=0.0)
    assert with_memory(1_000, lambda: len(open_source(config, "train").images)) == "2"


def test_a_table_cannot_promise_more_pixels_than_any_loader_decodes() -> None:
    def table(height: int, width: int) -> Table:
        one = np.ones(1, np.int32)
        raw = np.zeros(1, bool)
        wide = np.ones(1, np.int64)
        return Table(wide, wide, one * height, one * width, one * 0, wide, wide, raw)

    check_table(table(9_000, 9_000), [100], "it")
    with pytest.raises(DataError, match=r"more than 89,478,485 pixels"):
        check_table(table(2**31 - 1, 2**31 - 1), [100], "it")


def test_converting_into_a_strangers_folder_writes_nowhere_else(tmp_path: Path) -> None:
    photo_tree(tmp_path / "photos", {"a": 2, "b": 2})
    target = tmp_path / "to"
    (target / FOLDER).mkdir(parents=True)
    line = {
        "part": "../../elsewhere",
        "chunk": 0,
        "rows": {},
        "shard": None,
        "encodings": {},
        "sums": [],
        "skipped": [],
    }
    (target / FOLDER / "plan.json").write_text("{}")
    (target / FOLDER / "journal.jsonl").write_text(json.dumps(line) + "\n")
    result = run(tmp_path / "photos", target, "--to", "ffcv")
    assert result.exit_code == 2
    assert "plan.json is damaged" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "to"]
