"""Sets in formats of their own, and lists of names: read, or refused in one line; nothing is unpickled."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import DataConfig, DataError, open_source
from pipelines.stored.arrays import read_npz
from pipelines.stored.trees import _voc_labels, read_class_list
from pipelines.subsets import load_subset
from tests.fuzz.test_bad_packed import readable
from tests.fuzz.trials import trials, try_mutations, with_memory
from tests.pipelines.stored_sets import noise, write_image, write_tree


def skin(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, x_train=noise(20, 4, 4, 3), y_train=np.arange(20) % 7)
    return buffer.getvalue()


@trials(quick=200, many=20_000)
def test_a_mutated_npz_is_read_or_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "skin_rgb.npz"

    def check(data: bytes) -> object:
        path.write_bytes(data)
        try:
            return open_source(DataConfig(source="skin", root=tmp_path), "train")
        except DataError as error:
            readable(error)
            return None

    assert try_mutations(check, [skin(False), skin(True)], count) > 0


def test_an_npz_that_unpacks_to_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 42,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"tells \(4398046511104,\) uint8, and has 0 bytes"):
        read_npz(path, ["x_train"])
    data = path.read_bytes()
    size = struct.pack("<I", len(header.getvalue()))
    path.write_bytes(data.replace(size, struct.pack("<I", 2**32 - 2)))
    assert with_memory(300, lambda: read_npz(path, ["x_train"])).startswith("ValueError")


@trials(quick=150, many=10_000)
def test_mutated_idx_files_are_read_or_refused(count: int, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, 20, 28, 28) + noise(20, 28, 28).tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 20) + bytes(range(10)) * 2)
    files = [raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"]
    whole = [path.read_bytes() for path in files]

    def check(data: bytes) -> object:
        place = len(data) < 1_000
        files[place].write_bytes(data)
        files[not place].write_bytes(whole[not place])
        try:
            return open_source(DataConfig(source="fashion_mnist", root=tmp_path), "train")
        except DataError as error:
            readable(error)
            return None

    assert try_mutations(check, whole, count) > 0


VOC = b"""<annotation><object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
LAUGHS = (
    b'<!DOCTYPE x [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(12))
    + b"]><x>&m;</x>"
)


@trials(quick=500, many=50_000)
def test_mutated_annotations_are_read_or_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.xml"

    def check(data: bytes) -> object:
        path.write_bytes(data)
        try:
            return _voc_labels(path)
        except DataError as error:
            readable(error)
            return None

    encoded = [
        b'<?xml version="1.0" encoding="%s"?>' % name + VOC for name in (b"latin-1", b"utf-16", b"hz", b"nonsense")
    ]
    assert try_mutations(check, [VOC, *encoded], count) > 0


def test_entities_do_not_multiply(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes(LAUGHS)
    assert with_memory(300, lambda: _voc_labels(path)).startswith("DataError")


def test_lists_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    write_tree(root / "train", {"n01": 3, "n02": 3})
    write_image(root / "val" / "images" / "0.png")
    write_image(tmp_path / "secret.png")
    listing = root / "val" / "val_annotations.txt"
    for name in ("../../../secret.png", str(tmp_path / "secret.png"), "a/../../../../secret.png"):
        listing.write_text(f"{name}\tn01\t0\t0\t1\t1\n")
        with pytest.raises(DataError, match="not in the folder of its images"):
            open_source(DataConfig(source="tiny_imagenet", root=root), "test")
    listing.write_bytes(b"\xff\xfe\t\n")
    with pytest.raises(DataError, match="cannot read"):
        open_source(DataConfig(source="tiny_imagenet", root=root), "test")


@pytest.mark.parametrize("kind", ["pipe", "device", "binary"])
def test_a_class_list_is_a_text_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(range(256)))
    assert with_memory(600, lambda: read_class_list(path), seconds=60).startswith("DataError")


HEAD = '{"source":"x","split":"y","content":"",'


@pytest.mark.parametrize(
    "text",
    [
        *("[", "[]", "{}", "[" * 50_000, "null", '{"source": 1}', '{"ids": 3}'),
        HEAD + '"ids":[[1]]}',
        HEAD + '"ids":[99999999999999999999999]}',
    ],
)
def test_a_damaged_label_subset_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "subset.json"
    path.write_text(text)
    source = open_source(DataConfig(source="digits"), "train")
    with pytest.raises(DataError) as caught:
        load_subset(path, source)
    readable(caught.value)
