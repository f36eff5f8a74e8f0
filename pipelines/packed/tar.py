"""Tar shards as WebDataset reads them: the files of a sample lie side by side and share their name up to the dot.

`000000123.jpg` (or .png), `000000123.cls` with the label as text, `000000123.index` with the position. Beside a
shard lies an index for NVIDIA DALI (wds2idx's version 1.2).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.packed.files import StoredFile, read_at
from pipelines.stored.images import EXTENSIONS, DataError

_BLOCK = 512
END = bytes(2 * _BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    offset: int  # of the file's first byte in the shard
    length: int

    @property
    def stem(self) -> str:
        """The name up to the first dot of its last part."""
        return self.name[: len(self.name) - len(self.extension) - 1] if self.extension else self.name

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]


@dataclass(frozen=True, slots=True)
class Scanned:
    """One sample that a scan of a shard found; `index` and `label` None where it has none."""

    index: int | None
    label: int | list[float] | None
    offset: int
    length: int
    size: tuple[int, int] | None = None  # (height, width), where the format tells


def pack_sample(index: int, label: np.ndarray, image: bytes, extension: str, at: int) -> tuple[bytes, int, str]:
    """(a sample's bytes in a shard, place of the image among all bytes, line of DALI's index); it starts at `at`."""
    stem = f"{index:09d}"
    told = json.dumps(label.tolist()) if label.ndim else str(int(label))
    parts, line, image_at = [], [], 0
    for ending, data in ((extension, image), ("cls", told.encode()), ("index", str(index).encode())):
        facts = tarfile.TarInfo(f"{stem}.{ending}")
        facts.size = len(data)
        parts += [facts.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)]
        at += _BLOCK
        if ending == extension:
            image_at = at
        line.append(f"{ending} {at} {len(data)} {facts.name}")
        at += len(data) + len(parts[-1])
    return b"".join(parts), image_at, " ".join(line)


def dali_index(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines))


def scan_tar(file: StoredFile) -> tuple[list[Scanned], str]:
    """The samples of a shard, of any writer, and DALI's index of it.

    Raises:
        DataError: not a tar, cut off, or a sample has no image or an unreadable label.
    """
    samples: list[list[Member]] = []
    last = None
    for member in _members(file):
        if not member.stem.rpartition("/")[2]:  # a hidden file
            continue
        if member.stem != last:
            samples.append([])
            last = member.stem
        samples[-1].append(member)
    lines = [" ".join(f"{m.extension} {m.offset} {m.length} {m.name}" for m in sample) for sample in samples]
    return [_sample(file, sample) for sample in samples], dali_index(lines)


def _members(file: StoredFile) -> Iterator[Member]:
    """The regular files of a tar. Their data is passed over, not read."""
    at, long_name = 0, ""
    while True:
        if at + _BLOCK > file.size:
            raise DataError(f"{file.place}: ends at byte {file.size:,} without the end mark of a tar; it was cut off")
        block = read_at(file, at, _BLOCK)
        if block == bytes(_BLOCK):
            return
        try:
            facts = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DataError(f"{file.place}: no tar header at byte {at:,}: {error}; the shard is damaged") from error
        data = at + _BLOCK
        if facts.size < 0 or data + facts.size > file.size:
            raise DataError(f"{file.place}: {facts.name} has {facts.size:,} bytes by its header; the shard was cut off")
        at = data + facts.size + -facts.size % _BLOCK
        if facts.type == tarfile.GNUTYPE_LONGNAME:
            long_name = read_at(file, data, facts.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif facts.type == tarfile.XHDTYPE:
            long_name = _pax_path(read_at(file, data, facts.size))
        else:
            if facts.isreg():
                yield Member(long_name or facts.name, data, facts.size)
            long_name = ""


def _pax_path(records: bytes) -> str:
    while records:  # "25 path=some/long/name\n": the length counts itself
        told, _, _ = records.partition(b" ")
        if not told.isdigit() or not len(told) < int(told) <= len(records):
            return ""
        key, _, value = records[len(told) + 1 : int(told) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        records = records[int(told) :]
    return ""


def _sample(file: StoredFile, members: list[Member]) -> Scanned:
    known = {member.extension.lower(): member for member in members}
    image = next((known[e[1:]] for e in EXTENSIONS if e[1:] in known), None)
    if image is None:
        raise DataError(f"{file.place}: sample {members[0].stem} has no image, only .{' .'.join(known)}")

    def read(extension: str) -> str | None:
        member = known.get(extension)
        return None if member is None else read_at(file, member.offset, member.length).decode("ascii", "replace")

    label, index = read("cls"), read("index")
    try:
        return Scanned(
            None if index is None else int(index),
            None if label is None else _label(label),
            image.offset,
            image.length,
        )
    except ValueError as error:
        raise DataError(f"{file.place}: sample {members[0].stem}: {error}; expected a whole number") from error


def _label(text: str) -> int | list[float]:
    if not text.lstrip().startswith("["):
        return int(text)
    return [float(value) for value in json.loads(text)]
