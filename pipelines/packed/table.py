"""Where each image of a packed part lies, as arrays: a million rows are checked in a fraction of a second."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pipelines.stored.encoded import MOST_BYTES, MOST_PIXELS
from pipelines.stored.images import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One row an image, in ascending order of `index`."""

    index: np.ndarray  # [N] int64, position in the set that was packed
    label: np.ndarray  # [N] int64, -1 unknown; or [N, C] float32, 1 present, 0 absent, -1 ignored
    height: np.ndarray  # [N] int32, pixels
    width: np.ndarray  # [N] int32
    shard: np.ndarray  # [N] int32, which file
    offset: np.ndarray  # [N] int64, of the image's bytes in it
    length: np.ndarray  # [N] int64, bytes
    raw: np.ndarray  # [N] bool: pixels [H, W, 3] rather than an encoded file

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: np.ndarray) -> Table:
        return Table(*(getattr(self, field.name)[rows] for field in fields(self)))

    def in_order(self) -> Table:
        ascending = len(self) < 2 or bool((np.diff(self.index) > 0).all())
        return self if ascending else self.select(np.argsort(self.index, kind="stable"))


_ODD = (RuntimeError, OverflowError, MemoryError, struct.error, zlib.error)  # what zipfile and NumPy raise besides
DTYPES = {
    "index": np.int64,
    "label": np.int64,
    "height": np.int32,
    "width": np.int32,
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
}


def check_table(table: Table, file_sizes: Sequence[int], name: str) -> None:
    """Every image inside its file, of a plausible size, and no position twice.

    Raises:
        DataError: names the first row that is wrong, and how.
    """

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{name}: the image at position {int(table.index[row])} {what}; the file is damaged")

    refuse(table.index < 0, "has a negative position")
    refuse((table.shard < 0) | (table.shard >= len(file_sizes)), "is in a file that is not listed")
    refuse((table.height < 1) | (table.width < 1), "has no pixels by the table")
    refuse((table.offset < 0) | (table.length < 1), "has no bytes by the table")
    ends = np.asarray(file_sizes, dtype=np.int64)[table.shard]
    # Written so that no sum can overflow.
    refuse((table.length > ends) | (table.offset > ends - table.length), "lies beyond the end of its file")
    pixels = table.height.astype(np.int64) * table.width
    refuse(pixels > MOST_PIXELS, f"has more than {MOST_PIXELS:,} pixels by the table")
    refuse(~table.raw & (table.length > MOST_BYTES), f"has more than {MOST_BYTES:,} bytes by the table")
    refuse(table.raw & (table.length != 3 * pixels), "has raw pixels that do not match its height and width")
    refuse(np.concatenate([[False], np.diff(table.index) == 0]), "is there twice")


def write_index(table: Table) -> bytes:
    """The `.index.npz` of shards, uncompressed."""
    file = io.BytesIO()
    np.savez(file, **{name: getattr(table, name) for name in DTYPES})
    return file.getvalue()


def read_index(data: bytes, name: str) -> Table:
    """`write_index` undone. No array is made before its bytes are known to be there."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            arrays = {key: _array(archive, f"{key}.npy") for key in DTYPES}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError, EOFError, *_ODD) as error:
        raise DataError(f"{name}: not an index of packed images: {error}; remove it to have it made again") from error
    label = arrays["label"]
    if label.ndim not in (1, 2):
        raise DataError(f"{name}: label is {label.dtype} {label.shape}, expected one or two axes")
    multi = label.ndim == 2 and label.dtype == np.float32
    for key, dtype in DTYPES.items():
        array = arrays[key]
        fits = (key == "label" and multi) or (array.ndim == 1 and array.dtype == dtype)
        if not fits or len(array) != len(label):
            raise DataError(f"{name}: {key} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} [{len(label)}]")
    return Table(**arrays, raw=np.zeros(len(label), dtype=bool)).in_order()


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    facts = archive.getinfo(name)
    if facts.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file = io.BytesIO(archive.read(facts))
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} has version {version} of NumPy's format, expected 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    data = file.getbuffer()[file.tell() :]
    count = 1
    for side in shape:
        count *= side
    if dtype.hasobject or fortran or count * dtype.itemsize != len(data):
        raise ValueError(f"{name} tells {shape} {dtype}, but holds {len(data):,} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
