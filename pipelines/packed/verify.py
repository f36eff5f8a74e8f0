"""Everything in a packed set read again: structure, checksums, tables, and every image decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.packed.checking import check_images
from pipelines.packed.files import StoredFile, exists, find_file, is_url, join, read_at, read_whole
from pipelines.packed.images import BetonImages, PackedImages
from pipelines.packed.journal import FOLDER
from pipelines.packed.manifest import Manifest, Part, read_manifest
from pipelines.packed.opening import open_images
from pipelines.packed.pool import run_tasks
from pipelines.packed.scanning import scan_shards
from pipelines.packed.table import DTYPES
from pipelines.packed.worker import dali_index_path
from pipelines.stored.images import DataError

_BLOCK = 8 << 20  # bytes hashed at a time
_TASK = 256  # images a worker checks at a time


@dataclass(slots=True)
class Verified:
    """What was looked at in one part or file, and what is wrong with it."""

    name: str
    images: int = 0
    files: int = 0
    bytes: int = 0
    defects: list[str] = field(default_factory=list)


def verify(place: str, *, workers: int, progress: Callable[[int], None] = lambda images: None) -> list[Verified]:
    """Check a packed folder (path or URL), or a single .beton, .tar or .tfrecord of any writer.

    Args:
        place: what to check.
        workers: processes that decode; 0: only this one.
        progress: told the number of images done, again and again.

    Raises:
        DataError: there is nothing of the kind at `place`.
    """
    kinds = {".beton": "ffcv", ".tar": "webdataset", ".tfrecord": "tfrecord"}
    kind = kinds.get(os.path.splitext(place)[1])
    if kind is not None:
        file = find_file(place)
        one = Verified(os.path.basename(place), files=1, bytes=file.size)
        _check(one, lambda: _foreign(file, kind), workers, progress)
        return [one]
    manifest = read_manifest(place)
    if manifest is None:
        if exists(join(place, f"{FOLDER}/plan.json")):
            raise DataError(f"{place}: the conversion is not finished; the command that began it goes on with it")
        raise DataError(
            f"{place}: no manifest.json of a finished conversion, and not a .beton, .tar or .tfrecord file; "
            "name one of these"
        )
    found = []
    for name, part in manifest.parts.items():
        one = Verified(name, files=len(part.shards), bytes=sum(shard.bytes for shard in part.shards))
        _check_sums(one, place, part)
        _check(one, lambda name=name: open_images(place, manifest, name), workers, progress)  # type: ignore[misc]
        if manifest.to != "ffcv":
            _check_index(one, place, manifest, name)
        found.append(one)
    return found


def _foreign(file: StoredFile, kind: str) -> PackedImages:
    if kind == "ffcv":
        return BetonImages(file.place)
    table = scan_shards((file,), "webdataset" if kind == "webdataset" else "tfrecord")[0]
    return PackedImages((file,), table, kind)


def _check(one: Verified, opened: Callable[[], PackedImages], workers: int, progress: Callable[[int], None]) -> None:
    """Structure, by opening, and then every image."""
    try:
        images = opened()
    except DataError as error:
        one.defects.append(str(error))
        return
    one.images = len(images)
    starts = range(0, len(images), _TASK)
    tasks = (images.select(np.arange(start, min(start + _TASK, len(images)))) for start in starts)
    defects: list[tuple[int, str]] = []
    for found in run_tasks(tasks, check_images, workers, progress=progress):
        defects += found
    one.defects += [defect for _, defect in sorted(defects)]


def _check_sums(one: Verified, folder: str, part: Part) -> None:
    for shard in part.shards:
        place = join(folder, shard.name)
        try:
            file, digest = find_file(place), hashlib.sha256()
            for block in _blocks(file):
                digest.update(block)
        except DataError as error:
            one.defects.append(str(error))
            continue
        if digest.hexdigest() != shard.sha256:
            one.defects.append(f"{place}: its SHA-256 is not the manifest's; the file was changed")


def _blocks(file: StoredFile) -> Iterator[bytes]:
    for start in range(0, file.size, _BLOCK):
        yield read_at(file, start, min(_BLOCK, file.size - start))


def _check_index(one: Verified, folder: str, manifest: Manifest, name: str) -> None:
    """The index, and DALI's, against what a scan of the shards finds."""
    if one.defects or is_url(folder):  # a scan behind a URL would be a request for each header
        return
    part = manifest.parts[name]  # type: ignore[index]
    files = tuple(find_file(join(folder, shard.name)) for shard in part.shards)
    try:
        there, (found, indices) = open_images(folder, manifest, name).table, scan_shards(files, manifest.to)
        for key in DTYPES:
            if not np.array_equal(getattr(there, key), getattr(found, key)):
                one.defects.append(f"{join(folder, f'{name}.index.npz')}: {key} is not what the shards hold; remove it")
        for file, index in zip(files, indices, strict=True):
            beside = str(dali_index_path(Path(file.place)))
            if read_whole(beside).decode("utf-8", "replace") != index:
                one.defects.append(f"{beside}: not an index of {file.place}; make it again with DALI's tool")
    except DataError as error:
        one.defects.append(str(error))
