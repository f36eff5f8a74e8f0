"""What a worker process of a verification does: files summed and scanned, images decoded. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.packed.encode import BadImage, Format, decode_checked
from pipelines.packed.files import StoredFile, find_file, read_at, read_whole
from pipelines.packed.images import PackedImages
from pipelines.packed.pool import Channel
from pipelines.packed.scanning import scan_shards
from pipelines.packed.table import DTYPES, Table
from pipelines.packed.worker import dali_index_path
from pipelines.stored.images import DataError

_BLOCK = 8 << 20  # bytes hashed at a time


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file, and what it should be."""

    place: str
    sha256: str
    kind: Format
    table: Table | None  # its rows of the index; None: not to be scanned
    index: str  # the index's name


def check_file(task: FileCheck, channel: Channel) -> list[str]:
    """Defects: another checksum than the manifest's, or other samples than the index and DALI's index tell of."""
    try:
        file, digest = find_file(task.place), hashlib.sha256()
        for block in _blocks(file):
            digest.update(block)
        if digest.hexdigest() != task.sha256:
            return [f"{task.place}: its SHA-256 is not the manifest's; the file was changed"]
        if task.table is None:
            return []
        found, dali = scan_shards((file,), task.kind)
        there, defects = replace(task.table, shard=np.zeros_like(task.table.shard)), []
        for key in DTYPES:
            if not np.array_equal(getattr(there, key), getattr(found, key)):
                defects.append(f"{task.index}: {key} is not what {task.place} holds; remove the index")
        beside = str(dali_index_path(Path(task.place)))
        if read_whole(beside).decode("utf-8", "replace") != dali[0]:
            defects.append(f"{beside}: not an index of {task.place}; make it again with DALI's tool")
        return defects
    except DataError as error:
        return [str(error)]


def _blocks(file: StoredFile) -> Iterator[bytes]:
    for start in range(0, file.size, _BLOCK):
        yield read_at(file, start, min(_BLOCK, file.size - start))


def check_images(images: PackedImages, channel: Channel) -> list[tuple[int, str]]:
    """(position, defect) of each image that is not what the table says, or does not decode without complaint."""
    defects = []
    for row in range(len(images)):
        try:
            wrong = _wrong(images, row)
        except (BadImage, DataError) as error:
            wrong = str(error)
        if wrong is not None:
            defects.append((int(images.table.index[row]), f"{images.where(row)}: {wrong}"))
    channel.progress(len(images))
    return defects


def _wrong(images: PackedImages, row: int) -> str | None:
    stored = images.read(row)
    if isinstance(stored, np.ndarray) and stored.ndim == 3:
        return None  # its length was compared with its height and width
    header, pixels = decode_checked(stored)
    height, width = int(images.table.height[row]), int(images.table.width[row])
    if pixels.shape[:2] != (height, width):
        return f"has {pixels.shape[0]} x {pixels.shape[1]} pixels, and {height} x {width} by the table"
    if images.kind == "ffcv" and (not header.plain_jpeg or header.orientation != 1):
        return f"is a {header.format} in mode {header.mode}, orientation {header.orientation}; FFCV reads upright JPEGs"
    return None
