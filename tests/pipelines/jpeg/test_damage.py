"""Files that are damaged, odd or of another kind: each is decoded rightly or refused with a reason; and headers."""

from __future__ import annotations

import io
import pickle
import re
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.jpeg.decoder import JpegDecoder, JpegError
from tests.pipelines.jpeg.jpeg_files import encode, frame_of, kinds, photo, pillow, with_size
from tests.pipelines.jpeg.test_decoder import KINDS, crops


def failure(decoder: JpegDecoder, data: bytes, box: Any = (0, 0, 64, 64), size: Any = (64, 64)) -> JpegError:
    """Of the second of three images, whose neighbours are whole."""
    good = encode(photo()[:64, :64])
    boxes = np.array([[[0, 0, 64, 64], box, [0, 0, 64, 64]]])
    out = np.full((1, 3, 64, 64, 3), 77, np.uint8)
    with pytest.raises(JpegError) as caught:
        decoder.decode_crops([good, data, good], boxes, out, sizes=np.array([(64, 64), size, (64, 64)]))
    assert caught.value.position == 1
    assert f"image 1: {caught.value.reason}" == str(caught.value)
    assert np.array_equal(out[0, 0], pillow(good))
    assert (out[0, 2] == 77).all()
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(decoder: JpegDecoder, kind: str) -> None:
    data = kinds(64, 64)[kind]
    header = decoder.header(data)
    size = header.height, header.width
    bottom = (size[0] - 8, size[1] - 8, 8, 8)
    for part in (0.3, 0.6, 0.9):
        assert failure(decoder, data[: int(part * len(data))], bottom, size).reason
    for end in (2, 20, data.index(b"\xff\xda")):
        with pytest.raises(JpegError, match=r"not a JPEG|ends before"):
            decoder.header(data[:end])
        with pytest.raises(JpegError, match=r"not a JPEG|ends before"):
            decoder.decode(data[:end])


def test_what_lies_below_the_crops_is_not_read(decoder: JpegDecoder) -> None:
    data = encode(photo(), subsampling="4:4:4")
    half = data[: len(data) // 2]
    box = np.array([[[0, 0, 64, 640]]])
    assert np.array_equal(crops(decoder, [half], box, 64), crops(decoder, [data], box, 64))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "not a JPEG|Empty input"),
        ("zeros", "[Nn]ot a JPEG"),
        ("png", "[Nn]ot a JPEG"),
        ("ends in the middle", "premature end"),
        ("without its end", "Premature end"),
        ("lost restart", "Corrupt JPEG data"),
        ("without tables", "table"),
        ("cmyk", "colours"),
        ("12 bits", "precision"),
        ("65000 x 65000", "header says 65000 x 65000 pixels"),
        ("other size", "header says 64 x 63 pixels"),
    ],
)
def test_damage_is_named(decoder: JpegDecoder, name: str, reason: str) -> None:
    good = kinds(64, 64)["420"]
    restarts = kinds(64, 64)["restarts"]
    middle, frame, scan = len(good) * 3 // 4, frame_of(good), good.index(b"\xff\xda")
    quantisation = good.index(b"\xff\xdb")
    table_end = quantisation + 2 + int.from_bytes(good[quantisation + 2 : quantisation + 4])
    second = restarts.index(b"\xff\xd1")
    data = {
        "empty": b"",
        "zeros": bytes(1000),
        "png": encode(photo()[:64, :64], "PNG"),
        "ends in the middle": good[:middle] + b"\xff\xd9",
        "without its end": good[:-2],
        "lost restart": restarts[:second] + restarts[second + 2 :],
        "without tables": good[:quantisation] + good[table_end:],
        "cmyk": cmyk(),
        "12 bits": good[: frame + 4] + b"\x0c" + good[frame + 5 :],
        "65000 x 65000": with_size(good, 65000, 65000),
        "other size": with_size(good, 64, 63),
    }[name]
    assert scan < middle
    error = failure(decoder, data)
    assert re.search(reason, error.reason), error.reason


def cmyk() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo()[:64, :64]).convert("CMYK").save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_refused_or_decoded_as_pillow_does(decoder: JpegDecoder, kind: str) -> None:
    """Pillow ignores libjpeg's warnings. Where we raise none of them, nothing was guessed on the way."""
    data = kinds(48, 56)[kind]
    rng = np.random.default_rng(len(data))
    refused = decoded = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(2, len(data))] ^= 1 << int(rng.integers(8))
        try:
            ours = decoder.decode(bytes(damaged))
        except JpegError:
            refused += 1
            continue
        decoded += 1
        try:
            theirs = pillow(bytes(damaged))
        except OSError:  # it looks at the end of the file, too
            continue
        assert np.array_equal(ours, theirs)
    assert refused
    assert decoded


@pytest.mark.parametrize("name", ["bytes before the end", "bytes before a table", "JFIF 7", "more behind"])
def test_what_is_harmless_is_accepted(decoder: JpegDecoder, name: str) -> None:
    good = kinds(64, 64)["420"]
    table = good.index(b"\xff\xc4")
    data = {
        "bytes before the end": good[:-2] + b"\x12\x34" + good[-2:],
        "bytes before a table": good[:table] + b"\x12\x34" + good[table:],
        "JFIF 7": good[:11] + b"\x07" + good[12:],
        "more behind": good + bytes(1000),
    }[name]
    assert np.array_equal(decoder.decode(data), pillow(good))


def test_tables_of_one_file_do_not_serve_the_next(decoder: JpegDecoder) -> None:
    good = kinds(64, 64)["444"]
    at = good.index(b"\xff\xdb")
    without = good[:at] + good[at + 2 + int.from_bytes(good[at + 2 : at + 4]) :]
    for _ in range(2):
        assert np.array_equal(decoder.decode(good), pillow(good))
        with pytest.raises(JpegError, match="uantization table"):
            decoder.decode(without)


def test_endless_scans_are_refused(decoder: JpegDecoder) -> None:
    data = kinds(64, 64)["progressive"]
    first = data.index(b"\xff\xda")  # the coarse mean of every block
    scan = bytearray(data[first : data.index(b"\xff\xc4", first)])
    scan[scan[3] + 1] = 0  # as if it were exact: it may then come any number of times
    assert decoder.decode(data[:-2] + bytes(scan) * 300 + data[-2:]).shape == (64, 64, 3)
    with pytest.raises(JpegError, match="too many scans"):
        decoder.decode(data[:-2] + bytes(scan) * 2000 + data[-2:])


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(JpegError(7, "why")))
    assert (error.position, error.reason) == (7, "why")


# ---- headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "channels", "supported", "progressive"),
    [
        ("420", 3, True, False),
        ("rgb", 3, True, False),
        ("gray", 1, True, False),
        ("progressive", 3, True, True),
        ("cmyk", 4, False, False),
        ("arithmetic", 3, False, False),
        ("arithmetic progressive", 3, False, True),
        ("lossless", 3, False, False),
        ("12 bits", 3, False, False),
    ],
)
def test_header(decoder: JpegDecoder, kind: str, channels: int, supported: bool, progressive: bool) -> None:
    plain = kinds(64, 40)["420"]
    frame = frame_of(plain)
    codes = {"arithmetic": 0xC9, "arithmetic progressive": 0xCA, "lossless": 0xC3}
    if kind in codes:
        data = plain[: frame + 1] + bytes([codes[kind]]) + plain[frame + 2 :]
    elif kind == "12 bits":
        data = plain[: frame + 4] + b"\x0c" + plain[frame + 5 :]
    else:
        data = cmyk() if kind == "cmyk" else kinds(64, 40)[kind]
    header = decoder.header(data)
    assert (header.channels, header.supported, header.progressive) == (channels, supported, progressive)
    assert (header.height, header.width) == ((64, 64) if kind == "cmyk" else (64, 40))
    assert header.orientation == 1
    if not supported:
        with pytest.raises(JpegError):
            decoder.decode(data)


def exif(value: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    number = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    software = struct.pack(order + "HHI4s", 0x0131, 2, 4, b"abc\0")
    orientation = struct.pack(order + "HHI", 0x0112, kind, count) + number
    if order == "<":
        entries = orientation + software
    else:
        entries = struct.pack(order + "HHI4s", 0x0100, 3, 1, bytes(4)) + orientation
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def segment(body: bytes, marker: int = 0xE1) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description "


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        *[([exif(value)], value) for value in range(1, 9)],
        *[([exif(value, ">")], value) for value in (1, 6, 8)],
        ([exif(6, kind=4)], 6),
        ([exif(0)], 1),
        ([exif(9)], 1),
        ([exif(2**31, kind=4)], 1),
        ([exif(6)[:-12]], 6),  # cut behind the entry
        ([exif(6)[:22]], 1),  # and in it
        ([b"Exif\0\0"], 1),
        ([b"Exif\0\0II*\0\xff\xff\xff\xff"], 1),
        ([b"Exif\0\0II*\0\x08\0\0\0\xff\xff"], 1),
        ([b"Exif\0\0XX*\0\x08\0\0\0\x01\0"], 1),
        ([XMP + b'tiff:Orientation="6"/>'], 6),
        ([XMP + b"><tiff:Orientation>8</tiff:Orientation>"], 8),
        ([XMP + b"tiff:Orientation"], 1),
        ([XMP + b'tiff:Orientation="'], 1),
        ([XMP + b'tiff:OrientationX tiff:Orientation="3"'], 3),
        ([XMP + b'tiff:Orientation="6"/>', exif(3)], 3),
        ([b"http://ns.adobe.com/xap/1.0/\0", b"", b"Exif"], 1),
    ],
)
def test_orientation(decoder: JpegDecoder, segments: list[bytes], orientation: int) -> None:
    plain = kinds(16, 16)["444"]
    data = plain[:2] + b"".join(map(segment, segments)) + plain[2:]
    assert decoder.header(data).orientation == orientation


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_as_pillow_writes_it(decoder: JpegDecoder, value: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = value
    tags[0x010F] = "a camera"
    assert decoder.header(encode(photo()[:8, :8], exif=tags)).orientation == value
