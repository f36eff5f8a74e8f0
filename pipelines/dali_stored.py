"""What DALI's own readers read: image files, webdataset and TFRecord shards."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pipelines.dali_pipelines import dali
from pipelines.draw import permutation
from pipelines.loading import StreamedLoader
from pipelines.packed.files import is_url
from pipelines.packed.images import PackedImages
from pipelines.stored.images import DataError, FileImages

READER = "reader"  # its name in a pipeline
OURS_CAN = "set data.reader=ours"
_SHUFFLED = 1024  # images of a shard reader's buffer, in which alone it shuffles


def stored_for_dali(loader: StreamedLoader) -> _Files | _Shards:
    """How DALI reads the images of a loader's source.

    Raises:
        DataError: it cannot.
    """
    images, name = loader.source.images, f"{loader.source.name}/{loader.source.split}"
    if isinstance(images, FileImages):
        return _Files(images, loader.seed)
    if isinstance(images, PackedImages) and images.kind in ("webdataset", "tfrecord"):
        return _Shards(images, name)
    kind = f"a {images.kind} file" if isinstance(images, PackedImages) else "an array in memory"
    raise DataError(
        f"DALI's readers take image files, webdataset and TFRecord shards, but {name} is {kind}; {OURS_CAN}"
    )


class _Files:
    """Image files, which DALI shuffles as a whole before each epoch."""

    kind = "file"

    def __init__(self, images: FileImages, seed: int) -> None:
        self.images = images
        # DALI's shuffle does not depend on a seed, so that all ranks agree; the order that it starts from does.
        self.order = permutation(seed, 0, len(images)).tolist()

    def read(self, rank: int, world_size: int) -> tuple[Any, Any]:
        return dali().fn.readers.file(
            files=[str(self.images.path(index)) for index in self.order],
            labels=self.order,
            shuffle_after_epoch=True,
            pad_last_batch=True,
            shard_id=rank,
            num_shards=world_size,
            dont_use_mmap=True,  # reading beyond the end of a map ends the process without a word
            name=READER,
        )

    def positions(self, index: Any) -> np.ndarray:
        return index.as_array().ravel().astype(np.int64)

    def feed(self, digest: Any) -> None:
        digest.update(self.images.names.tobytes())


class _Shards:
    """Shards of tar or TFRecord files, which DALI reads in order, shuffling in a buffer.

    Without `pad_last_batch` shuffled shards would give some images twice and others not at all from epoch to epoch.
    """

    def __init__(self, images: PackedImages, name: str) -> None:
        self.kind, self.images = images.kind, images
        self.paths = [file.place for file in images.files]
        if any(is_url(path) for path in self.paths):
            raise DataError(f"DALI's readers want files on this machine, but {name} is at {self.paths[0]}; {OURS_CAN}")
        self.indexes = [os.path.splitext(path)[0] + ".idx" for path in self.paths]
        for index in self.indexes:
            if not os.path.isfile(index):
                raise DataError(f"{name} has no DALI index {index}; convert the set again, or {OURS_CAN}")
        numbers = images.table.index
        self.position = np.full(int(numbers.max()) + 1, -1, np.int64)
        self.position[numbers] = np.arange(len(numbers))

    def read(self, rank: int, world_size: int) -> tuple[Any, Any]:
        readers = dali().fn.readers
        shared: dict[str, Any] = {
            "random_shuffle": True,
            "initial_fill": _SHUFFLED,
            "pad_last_batch": True,
            "shard_id": rank,
            "num_shards": world_size,
            "dont_use_mmap": True,
            "name": READER,
        }
        if self.kind == "webdataset":
            return readers.webdataset(
                paths=self.paths,
                index_paths=self.indexes,
                ext=["jpg;jpeg;png", "index"],
                missing_component_behavior="error",
                **shared,
            )
        from nvidia.dali import tfrecord

        features = {
            "image/encoded": tfrecord.FixedLenFeature([], tfrecord.string, ""),
            "index": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
        }
        read = readers.tfrecord(path=self.paths, index_path=self.indexes, features=features, **shared)
        return read["image/encoded"], read["index"]

    def positions(self, index: Any) -> np.ndarray:
        if self.kind == "tfrecord":
            numbers = index.as_array().ravel().astype(np.int64)
        else:
            numbers = np.array([int(bytes(np.asarray(index.at(i)))) for i in range(len(index))])
        known = (numbers >= 0) & (numbers < len(self.position))
        return np.where(known, self.position[np.where(known, numbers, 0)], -1)

    def feed(self, digest: Any) -> None:
        self.images.feed(digest, times=False)
