"""FFCV's file format, version 2, read without its library.

A file is a header, a descriptor of each field, one row of metadata a sample, the data, and a table of all
allocations, up to the end. An image's row tells its size, whether it is a JPEG or raw, and where it lies; how long
it is stands in the allocation table alone. Everything is little-endian.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from pipelines.packed.files import StoredFile, read_at
from pipelines.packed.table import Table
from pipelines.stored.images import DataError

VERSION = 2
FLOAT, INT, IMAGE, BYTES, NDARRAY, JSON, TENSOR = range(7)  # the fields' type numbers
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("length", "<u8")])
IMAGE_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
JPEG, RAW = 0, 1  # an image's mode
ROWS: dict[int, np.dtype] = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: IMAGE_ROW,
    BYTES: np.dtype([("offset", "<u8"), ("length", "<u8")]),
    NDARRAY: np.dtype("<u8"),
    JSON: np.dtype([("offset", "<u8"), ("length", "<u8")]),
    TENSOR: np.dtype("<u8"),
}
Refuse = Callable[[str], NoReturn]
NDARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])


def read_beton(file: StoredFile) -> Table:
    """Where each image lies, with its label and position.

    The first image field counts, and the integer or array field called `label`, else the first; without one labels
    are -1. Positions come from an integer field called `index`; without one they are 0, 1, 2, ...

    Raises:
        DataError: any table is not inside the file, incomplete, or contradicts another; names the defect.
    """

    def refuse(defect: str) -> NoReturn:
        raise DataError(f"{file.place}: {defect}; expected a complete .beton of FFCV's version {VERSION}")

    if file.size < HEADER.itemsize:
        refuse(f"has {file.size} bytes, too few for a header")
    header = np.frombuffer(read_at(file, 0, HEADER.itemsize), HEADER)[0]
    samples, end = int(header["samples"]), int(header["allocations"])
    if header["version"] != VERSION:
        refuse(f"starts with version {header['version']}")
    start = HEADER.itemsize + int(header["fields"]) * DESCRIPTOR.itemsize
    if not header["fields"] or start > file.size:
        refuse(f"tells {header['fields']} fields, which {file.size:,} bytes cannot hold")
    page_size = int(header["page_size"])
    if page_size & (page_size - 1) or not page_size:
        refuse(f"has pages of {page_size:,} bytes, not a power of two")

    fields = np.frombuffer(read_at(file, HEADER.itemsize, start - HEADER.itemsize), DESCRIPTOR)
    types = fields["type"].tolist()
    names = [name.split(b"\0")[0].decode("ascii", "replace") for name in fields["name"].tolist()]
    unknown = [name for name, kind in zip(names, types, strict=True) if kind not in ROWS]
    if unknown:
        refuse(f"has fields of a type that FFCV does not define: {', '.join(unknown)}")
    if IMAGE not in types:
        refuse(f"has no image field, only {', '.join(names)}")
    row = np.dtype([(f"{place}", ROWS[kind]) for place, kind in enumerate(types)], align=True)
    if not samples or not start + samples * row.itemsize <= end <= file.size:
        refuse(f"tells {samples:,} samples and allocations at byte {end:,} of {file.size:,}")
    pointers = sum(kind not in (FLOAT, INT) for kind in types)
    if file.size - end != pointers * samples * ALLOCATION.itemsize:
        refuse(
            f"has {(file.size - end) / ALLOCATION.itemsize:,.8g} allocations instead of {pointers * samples:,} "
            f"({pointers} for each of {samples:,} samples)"
        )
    rows = np.frombuffer(read_at(file, start, samples * row.itemsize), row)
    allocations = _Allocations(file, end, start + rows.nbytes, page_size, refuse)

    image = rows[f"{types.index(IMAGE)}"]
    if (image["mode"] > RAW).any():
        refuse(f"sample {int(np.argmax(image['mode'] > RAW))} is stored in a way that FFCV does not define")
    offset = np.ascontiguousarray(image["offset"])
    table = Table(
        index=_index(rows, names, types),
        label=_labels(file, rows, fields, names, allocations),
        height=image["height"].astype(np.int32),
        width=image["width"].astype(np.int32),
        shard=np.zeros(samples, np.int32),
        offset=offset.astype(np.int64),
        length=allocations.lengths(offset),
        raw=image["mode"] == RAW,
    )
    return table.in_order()


class _Allocations:
    """Lengths of what the metadata points to."""

    def __init__(self, file: StoredFile, end: int, start: int, page_size: int, refuse: Refuse) -> None:
        stored = np.frombuffer(read_at(file, end, file.size - end), ALLOCATION)
        stored = stored[stored["length"] > 0]
        order = np.argsort(stored["offset"], kind="stable")
        self._offsets, self._lengths = stored["offset"][order], stored["length"][order]
        self._samples, self._refuse = stored["sample"][order], refuse
        offsets, lengths = self._offsets, self._lengths
        beyond = (lengths > end) | (offsets > end - np.minimum(lengths, end)) | (offsets < start)
        if beyond.any():
            self._fail(beyond, "lies outside the data")
        overlapping = offsets[1:] < offsets[:-1] + lengths[:-1]
        if overlapping.any():
            self._fail(overlapping, "overlaps the next one")
        crossing = offsets // page_size != (offsets + lengths - np.uint64(1)) // page_size
        if crossing.any():
            self._fail(crossing, f"crosses a page of {page_size:,} bytes")

    def _fail(self, bad: np.ndarray, how: str) -> NoReturn:
        place = int(np.argmax(bad))
        self._refuse(f"the allocation of {self._lengths[place]:,} bytes at {self._offsets[place]:,} {how}")

    def lengths(self, offsets: np.ndarray) -> np.ndarray:
        """[N] int64 bytes, of what samples 0..N-1 have at `offsets` [N]."""
        places = np.minimum(np.searchsorted(self._offsets, offsets), max(len(self._offsets) - 1, 0))
        known = np.zeros(len(offsets), bool)
        if len(self._offsets):
            known = (self._offsets[places] == offsets) & (self._samples[places] == np.arange(len(offsets)))
        if not known.all():
            sample = int(np.argmin(known))
            self._refuse(f"sample {sample} points to byte {offsets[sample]:,}, where nothing was allocated for it")
        return self._lengths[places].astype(np.int64)


def _index(rows: np.ndarray, names: list[str], types: list[int]) -> np.ndarray:
    for place, (name, kind) in enumerate(zip(names, types, strict=True)):
        if name == "index" and kind == INT:
            return rows[f"{place}"].astype(np.int64)
    return np.arange(len(rows))


def _labels(
    file: StoredFile, rows: np.ndarray, fields: np.ndarray, names: list[str], allocations: _Allocations
) -> np.ndarray:
    """[N] int64, or [N, C] float32 from arrays; an array of one integer is that integer."""
    places = [
        place
        for place, kind in enumerate(fields["type"].tolist())
        if kind in (INT, NDARRAY, TENSOR) and not (kind == INT and names[place] == "index")
    ]
    if not places:
        return np.full(len(rows), -1)
    place = next((place for place in places if names[place] == "label"), places[0])
    stored = np.ascontiguousarray(rows[f"{place}"])
    if fields["type"][place] == INT:
        return stored.astype(np.int64)
    dtype, shape = _array_type(file, names[place], fields["arguments"][place])
    lengths, expected = allocations.lengths(stored), dtype.itemsize * math.prod(shape)
    if (lengths != expected).any():
        sample = int(np.argmax(lengths != expected))
        raise DataError(
            f"{file.place}: {names[place]} of sample {sample} has {lengths[sample]:,} bytes instead of {expected:,}; "
            "the file is damaged"
        )
    data = b"".join(read_at(file, offset, expected) for offset in stored.tolist())
    values = np.frombuffer(data, dtype).reshape(len(rows), -1)
    if values.shape[1] == 1 and dtype.kind in "iu":
        return values[:, 0].astype(np.int64)
    return values.astype(np.float32)


def _array_type(file: StoredFile, name: str, arguments: np.ndarray) -> tuple[np.dtype, tuple[int, ...]]:
    head = arguments[: NDARRAY_ARGUMENTS.itemsize].view(NDARRAY_ARGUMENTS)[0]
    text = arguments[NDARRAY_ARGUMENTS.itemsize :][: int(head["type_length"])].tobytes()
    try:
        ((_, kind),) = json.loads(text)
        if not re.fullmatch(r"[<>|]?[fiub][1248]", kind):
            raise ValueError(f"elements of type {kind!r}")
        dtype = np.dtype(kind)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file.place}: cannot read what the arrays of {name!r} hold: {error}") from error
    return dtype, tuple(side for side in head["shape"].tolist() if side)
