"""What a worker process of a conversion does: one chunk of images, encoded and written, and what to remember of it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.packed import tar, tfrecord
from pipelines.packed.beton_writer import LONGEST, label_bytes
from pipelines.packed.encode import BadImage, Encoded, Options, encode
from pipelines.packed.pool import Channel
from pipelines.stored.images import DataError, FileImages, Images

PARTIAL = ".partial"  # the ending of all data until the whole set is packed

CONTINUES = "mend that, and the same command continues where this one stopped"
_REPORTED = 16  # images at a time


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some images of a part: a shard, or a stretch of a .beton."""

    folder: str
    lock: str
    part: str
    number: int
    images: Images
    index: np.ndarray  # [n] int64, positions in the source
    label: np.ndarray  # [n] int64 or [n, C] float32
    options: Options


class Writer(Protocol):
    def add(self, index: int, label: np.ndarray, image: Encoded) -> None: ...

    def close(self) -> tuple[list[int], list[int], dict[str, Any] | None]:
        """(places of the images, their lengths, the shard as the manifest has it)."""
        ...


def pack_chunk(chunk: Chunk, channel: Channel) -> dict[str, Any]:
    """Write a chunk; its line for the journal (JSON).

    Raises:
        DataError: it cannot be written.
    """
    with shared_lock(chunk.lock), _naming(data_path(chunk.folder, chunk.part, chunk.number, chunk.options.to)):
        # With the lock held: if the parent is gone, another one may have finished this chunk. This would raise.
        channel.progress(0)
        writer: Writer = BetonWriter(chunk, channel) if chunk.options.to == "ffcv" else ShardWriter(chunk)
        rows: dict[str, list[int]] = {name: [] for name in ("index", "height", "width", "raw")}
        encodings: Counter[str] = Counter()
        sums, skipped = np.zeros((2, 3)), []
        for row, index in enumerate(chunk.index.tolist()):
            if row % _REPORTED == 0:
                channel.progress(min(_REPORTED, len(chunk.index) - row))
            try:
                image = encode(chunk.images, row, index, chunk.options)
                if len(image.data) > LONGEST - 65_536:
                    raise BadImage(f"{len(image.data):,} bytes, more than 2 GiB")
            except BadImage as error:
                skipped.append({"file": _name(chunk, row), "part": chunk.part, "index": index, "reason": str(error)})
                continue
            writer.add(index, chunk.label[row], image)
            rows["index"].append(index)
            rows["height"].append(image.height)
            rows["width"].append(image.width)
            rows["raw"].append(int(image.encoding == "raw" and chunk.options.to == "ffcv"))
            encodings[image.encoding] += 1
            sums += [image.means, image.squares]
        offsets, lengths, shard = writer.close()
    return {
        "part": chunk.part,
        "chunk": chunk.number,
        "rows": {**rows, "offset": offsets, "length": lengths},
        "shard": shard,
        "encodings": encodings,
        "sums": sums.tolist(),
        "skipped": skipped,
    }


def data_path(folder: str, part: str, number: int, to: str) -> str:
    """Where chunk `number` goes while the set is incomplete."""
    if to == "ffcv":
        return os.path.join(folder, f"{part}.beton{PARTIAL}")
    return os.path.join(folder, f"{part}-{number:05d}.{'tar' if to == 'webdataset' else 'tfrecord'}{PARTIAL}")


@contextmanager
def shared_lock(path: str) -> Iterator[None]:
    """Held while this process writes: whoever takes over after a kill waits for it to be free."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError:  # the parent is gone
        raise
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; {CONTINUES}") from error


class BetonWriter:
    """Encodes into memory, then writes at the places that the parent assigns."""

    def __init__(self, chunk: Chunk, channel: Channel) -> None:
        self._path = data_path(chunk.folder, chunk.part, chunk.number, chunk.options.to)
        self._part, self._channel = chunk.part, channel
        self._data: list[bytes] = []  # an image with its label behind it
        self._lengths: list[int] = []  # of the image alone

    def add(self, index: int, label: np.ndarray, image: Encoded) -> None:
        self._data.append(image.data + label_bytes(label))
        self._lengths.append(len(image.data))

    def close(self) -> tuple[list[int], list[int], None]:
        places: list[int] = self._channel.ask((self._part, [len(data) for data in self._data]))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for data, place in zip(self._data, places, strict=True):
                _write_at(descriptor, data, place)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return places, self._lengths, None


class ShardWriter:
    """Writes sample after sample, with DALI's index beside it."""

    def __init__(self, chunk: Chunk) -> None:
        self._to = chunk.options.to
        self._path = data_path(chunk.folder, chunk.part, chunk.number, self._to)
        self._extension = "png" if chunk.options.write_mode == "raw" else "jpg"
        self._file = open(self._path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close)
        self._digest = hashlib.sha256()
        self._at = 0
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._lines: list[str] = []

    def add(self, index: int, label: np.ndarray, image: Encoded) -> None:
        if self._to == "webdataset":
            sample, offset, line = tar.pack_sample(index, label, image.data, self._extension, self._at)
        else:
            size = image.height, image.width
            sample, offset, line = tfrecord.pack_record(index, label, image.data, size, self._at)
        self._write(sample)
        self._offsets.append(offset)
        self._lengths.append(len(image.data))
        self._lines.append(line)

    def close(self) -> tuple[list[int], list[int], dict[str, Any] | None]:
        if self._to == "webdataset":
            self._write(tar.END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = Path(self._path)
        if not self._lines:  # not one image could be read
            path.unlink()
            return [], [], None
        index = tar.dali_index(self._lines) if self._to == "webdataset" else tfrecord.dali_index(self._lines)
        write_file(str(dali_index_path(path)), index.encode())
        name = path.name.removesuffix(PARTIAL)
        facts = {"name": name, "samples": len(self._lines), "bytes": self._at, "sha256": self._digest.hexdigest()}
        return self._offsets, self._lengths, facts

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)


def dali_index_path(path: Path) -> Path:
    """`train-00000.idx` beside `train-00000.tar`, both still incomplete or not."""
    partial = PARTIAL if path.name.endswith(PARTIAL) else ""
    return path.with_name(path.name.split(".")[0] + ".idx" + partial)


def write_file(path: str, data: bytes) -> None:
    """Written under another name and renamed, so that it is there as a whole or not at all."""
    draft = f"{path}.{os.getpid()}.tmp"
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:  # one call writes 2 GiB at most, and less on a disk that is nearly full
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _name(chunk: Chunk, row: int) -> str:
    images = chunk.images
    return str(images.path(row)) if isinstance(images, FileImages) else images.where(row)
