"""Everything in a packed set read again: structure, checksums, tables, and every image decoded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.packed.checking import FileCheck, check_file, check_images
from pipelines.packed.encode import Format
from pipelines.packed.files import StoredFile, exists, find_file, is_url, join
from pipelines.packed.images import BetonImages, PackedImages
from pipelines.packed.journal import FOLDER
from pipelines.packed.manifest import NAME, Manifest, Part, read_manifest
from pipelines.packed.opening import open_images
from pipelines.packed.pool import run_tasks
from pipelines.packed.scanning import scan_shards
from pipelines.stored.images import DataError

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
    manifest = read_manifest(place)
    kind = None if manifest is not None or os.path.isdir(place) else _kind(place)
    if kind is not None:
        file = find_file(place)
        one = Verified(os.path.basename(place), files=1, bytes=file.size)
        _check_images(one, _opened(one, lambda: _foreign(file, kind)), workers, progress)
        return [one]
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
        images = _opened(one, lambda name=name: open_images(place, manifest, name))  # type: ignore[misc]
        one.defects += [] if images is None else _differences(place, manifest.parts[name], manifest, images)
        for defects in run_tasks(_file_checks(place, name, manifest, images), check_file, workers):
            one.defects += defects
        _check_images(one, images, workers, progress)
        found.append(one)
    return found


def _kind(place: str) -> Format | None:
    """By the name; TensorFlow likes to number shards behind the ending, as in `x.tfrecord-00000-of-01024`."""
    kinds: dict[str, Format] = {".beton": "ffcv", ".tar": "webdataset", ".tfrecord": "tfrecord"}
    name = os.path.basename(place)
    numbered = re.search(r"-\d+-of-\d+$", name) is not None
    return "tfrecord" if numbered or "tfrecord" in name else kinds.get(os.path.splitext(name)[1])


def _foreign(file: StoredFile, kind: Format) -> PackedImages:
    if kind == "ffcv":
        images: PackedImages = BetonImages(file.place)
    else:
        images = PackedImages((file,), scan_shards((file,), kind)[0], kind)
    label = images.table.label
    odd = ~((label >= -1) & np.isfinite(label)).reshape(len(label), -1).all(1)
    if odd.any():
        row = int(np.argmax(odd))
        raise DataError(f"{images.where(row)} has the label {label[row]}; expected numbers from -1 on")
    return images


def _opened(one: Verified, open_them: Callable[[], PackedImages]) -> PackedImages | None:
    """Opening checks the structure."""
    try:
        images = open_them()
    except DataError as error:
        one.defects.append(str(error))
        return None
    one.images = len(images)
    return images


def _check_images(one: Verified, images: PackedImages | None, workers: int, progress: Callable[[int], None]) -> None:
    if images is None:
        return
    starts = range(0, len(images), _TASK)
    tasks = (images.select(np.arange(start, min(start + _TASK, len(images)))) for start in starts)
    defects: list[tuple[int, str]] = []
    for found in run_tasks(tasks, check_images, workers, progress=progress):
        defects += found
    one.defects += [defect for _, defect in sorted(defects)]


def _differences(place: str, part: Part, manifest: Manifest, images: PackedImages) -> list[str]:
    """Figures of the manifest that are not those of the tables."""
    table = images.table
    shards = np.bincount(table.shard, minlength=len(part.shards)).tolist()
    pairs: list[tuple[str, Any, Any]] = [
        ("samples of the files", [shard.samples for shard in part.shards], shards),
        ("kept + encoded + raw", part.kept + part.encoded + part.raw, len(table)),
    ]
    if manifest.to == "ffcv":
        pairs.append(("raw", part.raw, int(table.raw.sum())))
    for name in ("height", "width"):
        sides = getattr(table, name)
        told, found = getattr(part, name), (int(sides.min()), float(np.median(sides)), int(sides.max()))
        pairs.append((f"least, median and largest {name}", (told.min, told.median, told.max), found))
    if part.class_counts is not None:
        count = np.bincount(table.label[table.label >= 0], minlength=len(manifest.classes))
        lost = np.array(part.class_counts) - count  # those that were skipped
        if len(part.class_counts) != len(manifest.classes) or lost.min() < 0 or lost.sum() > part.skipped:
            pairs.append(("class_counts", list(part.class_counts), f"{count.tolist()} and {part.skipped} skipped"))
    place = join(place, NAME)
    return [f"{place}: {what}: {told}, and {found} by the tables" for what, told, found in pairs if told != found]


def _file_checks(folder: str, name: str, manifest: Manifest, images: PackedImages | None) -> Iterator[FileCheck]:
    for number, shard in enumerate(manifest.parts[name].shards):  # type: ignore[index]
        table = None
        # A scan behind a URL would be a request for each header.
        if images is not None and manifest.to != "ffcv" and not is_url(folder):
            table = images.table.select(np.flatnonzero(images.table.shard == number))
        yield FileCheck(join(folder, shard.name), shard.sha256, manifest.to, table, join(folder, f"{name}.index.npz"))
