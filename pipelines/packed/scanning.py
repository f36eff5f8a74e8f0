"""What shards hold, found by reading them: to make a lost index again, and to verify the one there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pipelines.packed.encode import BadImage, Format, read_header
from pipelines.packed.files import StoredFile, read_at
from pipelines.packed.table import Table
from pipelines.packed.tar import Scanned, scan_tar
from pipelines.packed.tfrecord import scan_tfrecord
from pipelines.stored.encoded import MOST_BYTES
from pipelines.stored.images import DataError

_HEAD = 1 << 16  # bytes in which an image's size usually stands


def scan_shards(files: Sequence[StoredFile], kind: Format) -> tuple[Table, list[str]]:
    """(where each image lies, DALI's index of each shard). Samples without a position are counted through.

    Raises:
        DataError: a shard is damaged, or only some samples have labels or positions.
    """
    found: list[tuple[int, Scanned]] = []
    indices = []
    for number, file in enumerate(files):
        samples, index = scan_tar(file) if kind == "webdataset" else scan_tfrecord(file)
        found += [(number, sample) for sample in samples]
        indices.append(index)
    place = files[0].place
    if not found:
        raise DataError(f"{place}: holds no samples")
    sizes = [sample.size or _size(files[number], sample) for number, sample in found]
    table = Table(
        index=_positions([sample.index for _, sample in found], place),
        label=_labels([sample.label for _, sample in found], place),
        height=np.array([height for height, _ in sizes], np.int32),
        width=np.array([width for _, width in sizes], np.int32),
        shard=np.array([number for number, _ in found], np.int32),
        offset=np.array([sample.offset for _, sample in found], np.int64),
        length=np.array([sample.length for _, sample in found], np.int64),
        raw=np.zeros(len(found), bool),
    )
    return table.in_order(), indices


def _size(file: StoredFile, sample: Scanned) -> tuple[int, int]:
    if sample.length > MOST_BYTES:
        raise DataError(f"{file.place}: the image at byte {sample.offset:,} has {sample.length:,} bytes")
    for length in (min(_HEAD, sample.length), sample.length):
        try:
            header = read_header(read_at(file, sample.offset, length))
        except BadImage as error:
            if length == sample.length:
                raise DataError(f"{file.place}: the image at byte {sample.offset:,}: {error}") from error
        else:
            turned = header.orientation in (5, 6, 7, 8)
            return (header.width, header.height) if turned else (header.height, header.width)
    raise AssertionError


def _positions(told: Iterable[int | None], place: str) -> np.ndarray:
    known = list(told)
    if all(position is None for position in known):
        return np.arange(len(known))
    if None in known:
        raise DataError(f"{place}: some samples have no position; convert the set again")
    return np.array(known, np.int64)


def _labels(told: Sequence[int | list[float] | None], place: str) -> np.ndarray:
    if all(label is None for label in told):
        return np.full(len(told), -1)
    if all(isinstance(label, int) for label in told):
        return np.array(told, np.int64)
    rows = [label for label in told if isinstance(label, list)]
    if len(rows) != len(told) or len({len(row) for row in rows}) > 1:
        raise DataError(f"{place}: samples have labels of several kinds or lengths; convert the set again")
    return np.array(rows, np.float32)
