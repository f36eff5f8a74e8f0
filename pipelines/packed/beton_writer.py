"""FFCV's file format, version 2, written without its library. `pipelines.packed.beton` says how it is laid out.

Several processes write images at places that one of them assigns; the tables come last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np

from pipelines.packed.beton import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    IMAGE,
    IMAGE_ROW,
    INT,
    JPEG,
    NDARRAY,
    NDARRAY_ARGUMENTS,
    RAW,
    VERSION,
)
from pipelines.packed.table import Table

PAGE_SIZE = 8 << 20  # as FFCV's own writer
LONGEST = 1 << 31  # bytes of one image: a page's size must fit into 32 bits


def data_start(samples: int, columns: int | None) -> int:
    """The first byte behind the metadata of `samples`; `columns` of a multi-label set, else None."""
    return HEADER.itemsize + 3 * DESCRIPTOR.itemsize + samples * _row(columns).itemsize


def assign(cursor: int, lengths: Sequence[int]) -> list[int]:
    """Places for allocations of `lengths` bytes, from byte `cursor` on, none of them across a page.

    FFCV's pages are counted from the start of the file. What is longer than a page gets a larger one, aligned to its
    size: with that as the size of all pages the smaller allocations still cross none.
    """
    places = []
    for length in lengths:
        page = page_of(length)
        if cursor // page != (cursor + length - 1) // page:
            cursor += -cursor % page
        places.append(cursor)
        cursor += length
    return places


def page_of(length: int) -> int:
    return max(PAGE_SIZE, 1 << (length - 1).bit_length())


def finish(path: str, table: Table, end: int) -> None:
    """Write header, descriptors, metadata and allocations around data that ends at byte `end`.

    A multi-label row lies right behind its image, as `label_bytes`. The header goes last, so that a file without its
    tables is not mistaken for a whole one.
    """
    columns = table.label.shape[1] if table.label.ndim == 2 else None
    rows = np.zeros(len(table), _row(columns))
    rows["image"]["mode"] = np.where(table.raw, RAW, JPEG)
    rows["image"]["width"], rows["image"]["height"] = table.width, table.height
    rows["image"]["offset"] = table.offset
    rows["label"] = table.label if columns is None else table.offset + table.length
    rows["index"] = table.index

    allocations = np.zeros((len(table), 1 if columns is None else 2), ALLOCATION)
    allocations["sample"] = np.arange(len(table))[:, None]
    allocations["offset"][:, 0], allocations["length"][:, 0] = table.offset, table.length
    longest = int(table.length.max())
    if columns is not None:
        allocations["offset"][:, 1], allocations["length"][:, 1] = rows["label"], 4 * columns
        longest += 4 * columns
    end += -end % 8
    header = np.array((VERSION, 3, page_of(longest), len(table), end), HEADER)

    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(allocations.tobytes())
        file.seek(HEADER.itemsize)
        file.write(_descriptors(columns).tobytes() + rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())


def label_bytes(label: np.ndarray) -> bytes:
    """What follows an image in the data: the row of a multi-label set, nothing otherwise."""
    return label.astype("<f4").tobytes() if label.ndim == 1 else b""


def _row(columns: int | None) -> np.dtype:
    label = "<i8" if columns is None else "<u8"
    return np.dtype([("image", IMAGE_ROW), ("label", label), ("index", "<i8")], align=True)


def _descriptors(columns: int | None) -> np.ndarray:
    fields = np.zeros(3, DESCRIPTOR)
    fields["name"] = [b"image", b"label", b"index"]
    fields["type"] = [IMAGE, INT if columns is None else NDARRAY, INT]
    if columns is not None:
        kind = json.dumps([["", "<f4"]]).encode()
        arguments = np.zeros((), NDARRAY_ARGUMENTS)
        arguments["shape"][0], arguments["type_length"] = columns, len(kind)
        told = arguments.tobytes() + kind
        fields["arguments"][1, : len(told)] = np.frombuffer(told, np.uint8)
    return fields
