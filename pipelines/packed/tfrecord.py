"""TFRecord shards of `tf.train.Example`, written and read without TensorFlow.

A record is its length, a checksum of that, the message, and a checksum of the message (CRC-32C, masked). The message
holds `image/encoded`, `image/class/label`, `image/height`, `image/width` and `index`. Beside a shard lies an index for
NVIDIA DALI (tfrecord2idx's).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.packed.files import StoredFile, read_at
from pipelines.packed.tar import Scanned, checked_label
from pipelines.stored.images import DataError

Value = bytes | list[int] | list[float]
_AROUND = 16  # bytes of a record besides the message
_MOST_NUMBERS = 1 << 20  # in a list; as Python's numbers they take 36 bytes each
_MOST_BYTES = 1 << 30  # of a record, an image with its label
_MOST_FIELDS = 1 << 16  # of a record; ours has five features of five fields
_LENGTH_DELIMITED, _VARINT, _FIXED32 = 2, 0, 5  # protobuf's wire types


def pack_record(index: int, label: np.ndarray, image: bytes, size: tuple[int, int], at: int) -> tuple[bytes, int, str]:
    """(a record, place of the image among all bytes, line of DALI's index); it starts at byte `at`."""
    features: dict[str, Value] = {
        "image/encoded": image,
        "image/class/label": label.tolist() if label.ndim else [int(label)],
        "image/height": [size[0]],
        "image/width": [size[1]],
        "index": [index],
    }
    message = write_example(features)
    length = struct.pack("<Q", len(message))
    record = b"".join([length, _checksum(length), message, _checksum(message)])
    place = parse_example(message)["image/encoded"][1]
    return record, at + len(length) + 4 + place, f"{at} {len(record)}"


def dali_index(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def scan_tfrecord(file: StoredFile) -> tuple[list[Scanned], str]:
    """The samples of a shard, of any writer that uses these names, and DALI's index of it. Checksums are compared.

    Raises:
        DataError: cut off, a wrong checksum, a message that is no Example, or one without an image.
    """
    samples, lines, at = [], [], 0
    for at, message in _records(file):
        lines.append(f"{at} {len(message) + _AROUND}")
        try:
            samples.append(_sample(parse_example(message), at + 12))
        except ValueError as error:
            raise DataError(f"{file.place}: the record at byte {at:,}: {error}") from error
    return samples, dali_index(lines)


def _records(file: StoredFile) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < file.size:
        if at + _AROUND > file.size:
            raise DataError(f"{file.place}: ends within the record at byte {at:,}; the shard was cut off")
        head = read_at(file, at, 12)
        if head[8:] != _checksum(head[:8]):
            raise DataError(f"{file.place}: no record at byte {at:,}: its length has a wrong checksum")
        (length,) = struct.unpack("<Q", head[:8])
        if length > file.size - at - _AROUND:
            raise DataError(f"{file.place}: the record at byte {at:,} has {length:,} bytes; the shard was cut off")
        if length > _MOST_BYTES:
            raise DataError(f"{file.place}: the record at byte {at:,} has {length:,} bytes, more than {_MOST_BYTES:,}")
        body = read_at(file, at + 12, length + 4)
        if body[-4:] != _checksum(body[:-4]):
            raise DataError(f"{file.place}: the record at byte {at:,} has a wrong checksum; the shard is damaged")
        yield at, body[:-4]
        at += length + _AROUND


def _sample(features: Mapping[str, tuple[Value, int]], start: int) -> Scanned:
    image, place = features.get("image/encoded", (b"", 0))
    if not isinstance(image, bytes) or not image:
        raise ValueError(f"no image/encoded, only {', '.join(sorted(features))}")

    def number(key: str, least: int, most: int) -> int | None:
        values = features.get(key, ([], 0))[0]
        if not len(values):
            return None
        if not isinstance(values, list) or type(values[0]) is not int or not least <= values[0] <= most:
            raise ValueError(f"{key} is {_shown(values)}, expected a whole number from {least} to {most:,}")
        return values[0]

    label: int | list[float] | None = None
    stored = features.get("image/class/label", ([], 0))[0]
    if isinstance(stored, bytes):
        raise ValueError(f"image/class/label is the text {_shown(stored)}, expected numbers")
    if stored:
        several = isinstance(stored[0], float) or len(stored) > 1
        label = checked_label([float(v) for v in stored] if several else int(stored[0]))
    height, width = (number(f"image/{side}", 1, (1 << 31) - 1) for side in ("height", "width"))
    size = (height, width) if height is not None and width is not None else None
    return Scanned(number("index", 0, (1 << 63) - 1), label, start + place, len(image), size)


def _shown(values: Value) -> str:
    return repr(values[:8]) + (" ..." if len(values) > 8 else "")


def _checksum(data: bytes) -> bytes:
    import google_crc32c  # nobody else needs it

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_example(features: Mapping[str, Value]) -> bytes:
    """A serialised tf.train.Example. Lists hold ints (int64) or floats (float32)."""
    entries = []
    for key, value in features.items():
        if isinstance(value, bytes):
            kind, data = 1, _field(1, value)
        elif value and isinstance(value[0], float):
            kind, data = 2, _field(1, np.asarray(value, "<f4").tobytes())
        else:
            kind, data = 3, _field(1, b"".join(_varint(int(number) & (1 << 64) - 1) for number in value))
        entries.append(_field(1, _field(1, key.encode()) + _field(2, _field(kind, data))))
    return _field(1, b"".join(entries))


def parse_example(message: bytes) -> dict[str, tuple[Value, int]]:
    """name -> (value, place of a bytes value in the message, else 0).

    Raises:
        ValueError: not a tf.train.Example.
    """
    found: dict[str, tuple[Value, int]] = {}
    room = _Room()
    for number, first, last in _submessages(message, 0, len(message), room):
        if number != 1:
            continue
        for _, entry, entry_end in _submessages(message, first, last, room):
            key, feature = "", (0, 0)
            for place, begin, end in _submessages(message, entry, entry_end, room):
                if place == 1:
                    key = message[begin:end].decode("utf-8", "replace")
                elif place == 2:
                    feature = begin, end
            for kind, begin, end in _submessages(message, *feature, room):
                found[key] = _list(message, kind, begin, end, room)
    return found


@dataclass(slots=True)
class _Room:
    """How much of a record may still be taken apart: Python's numbers are forty times as large as packed ones."""

    fields: int = _MOST_FIELDS
    numbers: int = _MOST_NUMBERS

    def take(self, numbers: int) -> None:
        self.fields -= 1
        self.numbers -= numbers
        if self.numbers < 0:
            raise ValueError(f"more than {_MOST_NUMBERS:,} numbers in lists; images are stored as bytes")
        if self.fields < 0:
            raise ValueError(f"not a tf.train.Example of an image: it has more than {_MOST_FIELDS:,} fields")


def _list(message: bytes, kind: int, begin: int, end: int, room: _Room) -> tuple[Value, int]:
    ints: list[int] = []
    floats: list[float] = []
    for _, wire, value, first, last in _fields(message, begin, end):
        if kind > 1:
            room.fields += wire != _LENGTH_DELIMITED  # a number that is a field of its own counts as a number alone
            room.take(1 if wire != _LENGTH_DELIMITED else last - first if kind == 3 else (last - first) // 4)
        else:
            room.take(0)
        if kind == 1 and wire == _LENGTH_DELIMITED:
            return message[first:last], first  # the first of a list: an image has one
        if kind == 2:
            floats += np.frombuffer(message[first : last - (last - first) % 4], "<f4").tolist()
        elif kind == 3 and wire == _VARINT:
            ints.append(value)
        elif kind == 3:
            while first < last:
                value, first = _read_varint(message, first, last)
                ints.append(value)
    if kind == 2:
        return floats, 0
    return [number - (1 << 64) if number >> 63 else number for number in ints], 0


def _submessages(message: bytes, at: int, end: int, room: _Room) -> Iterator[tuple[int, int, int]]:
    for number, wire, _, first, last in _fields(message, at, end):
        room.take(0)
        if wire == _LENGTH_DELIMITED:
            yield number, first, last


def _fields(message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, value of a varint, first and last byte) of each field."""
    while at < end:
        tag, at = _read_varint(message, at, end)
        value, wire = 0, tag & 7
        if wire == _VARINT:
            first = at
            value, at = _read_varint(message, at, end)
        elif wire == _LENGTH_DELIMITED:
            length, first = _read_varint(message, at, end)
            at = first + length
        elif wire in (_FIXED32, 1):
            first, at = at, at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"not a tf.train.Example: wire type {wire}")
        if at > end:
            raise ValueError("not a tf.train.Example: a field ends beyond the message")
        yield tag >> 3, wire, value, first, at


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & (1 << 64) - 1, at
    raise ValueError("not a tf.train.Example: a number does not end")
