"""Images inside large files, seen like any others (`pipelines.stored.images.Images`).

They are shown in the order of the set that was packed, wherever they lie.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.packed.beton import read_beton
from pipelines.packed.files import StoredFile, check_version, find_file, is_url, read_at
from pipelines.packed.table import Table, check_table
from pipelines.stored.images import DataError, decode_bytes


class PackedImages:
    """Images at known places in one or several files.

    Args:
        files: the files.
        table: where each image lies.
        kind: "ffcv", "webdataset" or "tfrecord", for readers that know the format themselves.
        mapped: look into memory maps; False: read an image's bytes when it is asked for.

    Raises:
        DataError: the table does not fit the files.
    """

    def __init__(self, files: tuple[StoredFile, ...], table: Table, kind: str, *, mapped: bool = False) -> None:
        name = files[0].place if len(files) == 1 else f"{len(files)} files from {files[0].place} on"
        check_table(table, [file.size for file in files], name)
        self.files, self.table, self.kind = files, table, kind
        self._mapped = mapped and not any(is_url(file.place) for file in files)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        stored = self.read(index)
        if isinstance(stored, np.ndarray) and stored.ndim == 3:
            return np.array(stored)
        pixels = decode_bytes(stored, self.where(index))
        told = int(self.table.height[index]), int(self.table.width[index])
        if pixels.shape[:2] != told:
            raise DataError(
                f"{self.where(index)} has {pixels.shape[0]} x {pixels.shape[1]} pixels, but {told[0]} x {told[1]} by "
                "the table; the file is damaged: convert the set again"
            )
        return pixels

    def read(self, index: int) -> bytes | np.ndarray:
        index = range(len(self))[index]
        table = self.table
        shard, offset, length = int(table.shard[index]), int(table.offset[index]), int(table.length[index])
        stored: bytes | np.ndarray
        if self._mapped:
            stored = self._map(shard)[offset : offset + length]
        else:
            stored = read_at(self.files[shard], offset, length)
        if not table.raw[index]:
            return stored
        return np.frombuffer(stored, np.uint8).reshape(int(table.height[index]), int(table.width[index]), 3)

    def where(self, index: int) -> str:
        return f"image {int(self.table.index[index])} in {self.files[int(self.table.shard[index])].place}"

    @property
    def array(self) -> None:
        return None

    @property
    def size(self) -> tuple[int, int] | None:
        sizes = self.sizes
        if not len(sizes) or (sizes != sizes[0]).any():
            return None
        return int(sizes[0, 0]), int(sizes[0, 1])

    @property
    def sizes(self) -> np.ndarray:
        return np.stack([self.table.height, self.table.width], axis=1)

    @property
    def addresses(self) -> np.ndarray:
        starts = np.cumsum([0, *(file.size for file in self.files)])
        return starts[self.table.shard] + self.table.offset

    def select(self, positions: np.ndarray) -> Any:
        chosen = copy.copy(self)
        chosen.table = self.table.select(np.asarray(positions))
        return chosen

    def feed(self, digest: Any, *, times: bool = True) -> None:
        digest.update(f"packed {self.kind} {len(self)}".encode())
        for file in self.files:
            digest.update(f"{os.path.basename(file.place)}|{file.size}|{file.version if times else ''}".encode())
        for name in ("index", "shard", "offset", "length"):
            digest.update(np.ascontiguousarray(getattr(self.table, name)))

    def _map(self, shard: int) -> np.ndarray:
        mapped = self._maps.get(shard)
        if mapped is None:
            file = self.files[shard]
            try:
                with open(file.place, "rb") as opened:
                    check_version(file, opened.fileno())
                    mapped = np.asarray(np.memmap(opened, dtype=np.uint8, mode="r"))
            except OSError as error:
                raise DataError(f"cannot open {file.place}: {error.strerror}; was it moved?") from error
            self._maps[shard] = mapped
        file = self.files[shard]
        if os.stat(file.place).st_size < file.size:  # reading beyond its end would end the process
            raise DataError(f"{file.place} has become shorter during the run; put the whole file back")
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # pickle would write a map out whole


class BetonImages(PackedImages):
    """The images of a .beton, ours or any that FFCV wrote.

    Args:
        path: the file, or its URL.
        os_cache: map the file into memory; False: read image by image, so that none of it stays mapped.

    Raises:
        DataError: not a .beton, damaged, or without an image field; says what is wrong.
    """

    def __init__(self, path: str | Path, os_cache: bool = True) -> None:
        file = find_file(path)
        super().__init__((file,), read_beton(file), "ffcv", mapped=os_cache)
