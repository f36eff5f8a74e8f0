"""A packed set in place of the files it was made from: the same images, labels, positions and classes."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.packed.files import exists, find_file, is_url, join, read_whole
from pipelines.packed.images import BetonImages, PackedImages
from pipelines.packed.manifest import Manifest, Part, read_manifest
from pipelines.packed.scanning import scan_shards
from pipelines.packed.table import read_index, write_index
from pipelines.packed.worker import write_file
from pipelines.stored.common import Part as PartName
from pipelines.stored.common import Stored
from pipelines.stored.images import DataError
from pipelines.stored.trees import imagenet_classes

if TYPE_CHECKING:
    from pipelines.sources import DataConfig


@dataclass(frozen=True, slots=True)
class PackedSet:
    """A folder that `tools.convert` made, here or behind a URL."""

    folder: str
    manifest: Manifest

    def read(self, config: DataConfig, part: PartName) -> Stored:
        """One stored part, as the reader of the original set would give it.

        Raises:
            DataError: the part was not packed, files are missing or damaged, or classes that are asked for are not
                there.
        """
        name = "test" if part == "test" else "train"
        facts = self.manifest.parts.get(name)  # type: ignore[call-overload]
        if facts is None:
            raise DataError(
                f"{self.folder}: packed without its {name} images (there are: {', '.join(self.manifest.parts)}); "
                f"convert the set with --parts train,test"
            )
        images = open_images(self.folder, self.manifest, name, os_cache=config.os_cache)
        labels, ids = images.table.label, images.table.index
        wanted = _wanted_classes(config)
        if wanted is not None:
            rows, labels, ids = self._of_classes(config, facts, images, wanted)
            images = images.select(rows)
        elif part == "train" and labels.ndim == 1 and self.manifest.classes:
            rows = np.flatnonzero(labels >= 0)  # packed together with the unlabelled images
            if 0 < len(rows) < len(labels):
                images, labels, ids = images.select(rows), labels[rows], ids[rows]
        classes = self.manifest.classes if wanted is None else wanted
        return Stored(images, torch.from_numpy(np.array(labels)), classes, torch.from_numpy(np.array(ids)))

    def _of_classes(
        self, config: DataConfig, facts: Part, images: PackedImages, wanted: tuple[str, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, labels, positions) of some classes, as if only their folders had been listed."""
        there = {name: label for label, name in enumerate(self.manifest.classes)}
        missing = [name for name in wanted if name not in there]
        if missing or facts.class_counts is None:
            raise DataError(
                f"{config.source}: {self.folder} has no images of {len(missing)} of {len(wanted)} classes: "
                f"{', '.join(missing[:5])}; convert a set that has them"
            )
        old = np.array([there[name] for name in wanted])
        new = np.full(len(there), -1)
        new[old] = np.arange(len(wanted))
        counts = np.array(facts.class_counts)
        labels = new[images.table.label]
        rows = np.flatnonzero(labels >= 0)
        rows = rows[np.lexsort((images.table.index[rows], labels[rows]))]
        # Where a class began, and where it begins among the chosen ones.
        before = np.cumsum(counts) - counts
        begins = np.cumsum(counts[old]) - counts[old]
        ids = images.table.index[rows] - before[old][labels[rows]] + begins[labels[rows]]
        return rows, labels[rows], ids


def find_packed(config: DataConfig) -> PackedSet | None:
    """The packed set at `config.url` or `config.root`; None where the root holds something else.

    Raises:
        DataError: a set packed from another source, a damaged manifest, or nothing packed behind the URL.
    """
    folder = config.url or str(config.folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if config.url is not None:
            raise DataError(
                f"{folder}: no manifest.json of a packed set there; data.url takes what python -m tools.convert made "
                "(for files on this machine set data.root)"
            )
        return None
    subset = manifest.source == "imagenet" and re.fullmatch(r"imagenet\d+", config.source)
    if manifest.source != config.source and not subset:
        raise DataError(
            f"{folder} was packed from the source {manifest.source!r}, and data.source is {config.source!r}; set "
            f"data.source={manifest.source}, or give another data.root"
        )
    if manifest.chosen and config.class_list is None and not subset:
        raise DataError(
            f"{folder} holds only {len(manifest.classes):,} classes of {manifest.source}, those of a data.class_list: "
            f"{', '.join(manifest.classes[:5])}{' ...' if len(manifest.classes) > 5 else ''}; set data.class_list to a "
            f"list of some or all of them, or convert all of {manifest.source}"
        )
    return PackedSet(folder, manifest)


def open_images(folder: str, manifest: Manifest, name: str, *, os_cache: bool = True) -> PackedImages:
    """The images of part `name`, in the order of the original set.

    Raises:
        DataError: files are missing, of another size than the manifest says, or their tables are damaged.
    """
    part = manifest.parts[name]  # type: ignore[index]
    with ThreadPoolExecutor(16) as pool:  # behind a URL each is a request
        files = tuple(pool.map(find_file, (join(folder, shard.name) for shard in part.shards)))
    for file, shard in zip(files, part.shards, strict=True):
        if file.size != shard.bytes:
            raise DataError(
                f"{file.place} has {file.size:,} bytes, and {shard.bytes:,} by the manifest; it was cut off or "
                "replaced: copy it again, or convert the set again"
            )
    images: PackedImages
    if manifest.to == "ffcv":
        images = BetonImages(files[0].place, os_cache)
    else:
        place = join(folder, f"{name}.index.npz")
        if exists(place):
            table = read_index(read_whole(place), place)
        elif is_url(folder):
            raise DataError(f"{place} is missing; it is made again where the folder is a local one, then copy it there")
        else:
            table = scan_shards(files, manifest.to)[0]
            with contextlib.suppress(OSError):  # a read-only disk: scanned again next time
                write_file(place, write_index(table))
        images = PackedImages(files, table, manifest.to)
    if len(images) != part.count:
        raise DataError(f"{folder}: {len(images):,} {name} images, and {part.count:,} by the manifest; convert again")
    check_labels(images.table.label, len(manifest.classes), folder)
    return images


def check_labels(labels: np.ndarray, classes: int, name: str) -> None:
    if labels.ndim == 1:
        if len(labels) and (labels.min() < -1 or labels.max() >= max(classes, 1)):
            raise DataError(f"{name}: labels from {labels.min()} to {labels.max()}, expected -1 to {classes - 1}")
    elif labels.shape[1] != classes or not np.isin(labels, (-1, 0, 1)).all():
        raise DataError(f"{name}: rows of {labels.shape[1]} labels, expected {classes} of -1, 0 and 1")


def _wanted_classes(config: DataConfig) -> tuple[str, ...] | None:
    match = re.fullmatch(r"imagenet(\d*)", config.source)
    return imagenet_classes(config, config.folder, int(match[1] or 0) or None) if match else None
