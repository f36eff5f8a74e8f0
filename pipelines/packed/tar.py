"""Tar shards as WebDataset reads them: the files of a sample lie side by side and share their name up to the dot.

`000000123.jpg` (or .png), `000000123.cls` with the label as text, `000000123.index` with the position. Beside a
shard lies an index for NVIDIA DALI (wds2idx's version 1.2).
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.foreign import load_json
from pipelines.packed.files import StoredFile, read_at
from pipelines.stored.images import EXTENSIONS, DataError

_BLOCK = 512
END = bytes(2 * _BLOCK)
_LONGEST = {"cls": 1 << 16, "index": 1 << 10}  # bytes; a thousand classes take 5 kB
_LONGEST_HEADER = 1 << 16  # bytes of a long name, or of a pax header
_OTHER = (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # passed over
_READ = 1 << 23  # bytes at a time, where all are looked at


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
        DataError: not a tar, cut off, a sample is there twice, or has no image or an unreadable label.
    """
    samples: list[list[Member]] = []
    last, seen = None, set[str]()
    for member in _members(file):
        if not member.stem.rpartition("/")[2]:  # a hidden file
            continue
        if member.stem != last:
            if member.stem in seen:
                raise DataError(
                    f"{file.place}: sample {member.stem} is there twice, at byte {member.offset:,} again; the files of "
                    "a sample must lie side by side"
                )
            samples.append([])
            last = member.stem
            seen.add(last)
        samples[-1].append(member)
    lines = [" ".join(f"{m.extension} {m.offset} {m.length} {m.name}" for m in sample) for sample in samples]
    return [_sample(file, sample) for sample in samples], dali_index(lines)


def _members(file: StoredFile) -> Iterator[Member]:
    """The regular files of a tar. Their data is passed over, not read."""
    at, name, size = 0, "", None
    while True:
        if at + _BLOCK > file.size:
            raise DataError(f"{file.place}: ends at byte {file.size:,} without the end mark of a tar; it was cut off")
        block = read_at(file, at, _BLOCK)
        if block == bytes(_BLOCK):
            _check_end(file, at)
            return
        try:
            facts = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DataError(f"{file.place}: no tar header at byte {at:,}: {error}; the shard is damaged") from error
        data = at + _BLOCK
        length = facts.size if size is None else size
        if length < 0 or data + length > file.size:
            raise DataError(f"{file.place}: {facts.name} has {length:,} bytes by its header; the shard was cut off")
        at = data + length + -length % _BLOCK
        if facts.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if length > _LONGEST_HEADER:
                raise DataError(f"{file.place}: a header of {length:,} bytes before byte {at:,}; the shard is damaged")
            told = read_at(file, data, length)
            if facts.type == tarfile.XHDTYPE:
                name, size = _pax(told)
            else:
                name = told.rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            name = name or facts.name
            if facts.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                _check_name(file, name)
                yield Member(name, data, length)
            elif facts.type not in _OTHER:
                raise DataError(f"{file.place}: {name} is a link, a device or a sparse file; a shard holds files alone")
            name, size = "", None


def _check_name(file: StoredFile, name: str) -> None:
    """Nothing is unpacked here, but whoever unpacks the shard should find it in the folder that he chose."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{file.place}: {name} lies outside of the folder that the shard is unpacked to")


def _check_end(file: StoredFile, at: int) -> None:
    """A tar ends in two blocks of zeros at least; a lone one hides what follows."""
    if at + len(END) > file.size:
        raise DataError(f"{file.place}: ends in one block of zeros, at byte {at:,}, instead of two; it was cut off")
    for start in range(at, file.size, _READ):
        block = np.frombuffer(read_at(file, start, min(_READ, file.size - start)), np.uint8)
        if block.any():
            raise DataError(
                f"{file.place}: zeros from byte {at:,} on, where a tar would end, but data at byte "
                f"{start + int(np.argmax(block > 0)):,}; the shard is damaged"
            )


def _pax(records: bytes) -> tuple[str, int | None]:
    """(name, size) of the next file; "" and None where its own header tells them."""
    name, size = "", None
    while records:  # "25 path=some/long/name\n": the length counts itself
        told, _, _ = records.partition(b" ")
        if not told.isdigit() or len(told) > 9 or not len(told) < int(told) <= len(records):
            break
        key, _, value = records[len(told) + 1 : int(told) - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 19:
            size = int(value)
        records = records[int(told) :]
    return name, size


def _sample(file: StoredFile, members: list[Member]) -> Scanned:
    known: dict[str, Member] = {}
    name = members[0].stem
    for member in members:
        if known.setdefault(member.extension.lower(), member) is not member:
            raise DataError(f"{file.place}: sample {name} has .{member.extension} twice; one image a sample")
    image = next((known[e[1:]] for e in EXTENSIONS if e[1:] in known), None)
    if image is None:
        raise DataError(f"{file.place}: sample {name} has no image, only .{' .'.join(known)}")

    def read(extension: str) -> str | None:
        member = known.get(extension)
        if member is None:
            return None
        if member.length > _LONGEST[extension]:
            raise ValueError(f".{extension} has {member.length:,} bytes, more than {_LONGEST[extension]:,}")
        return read_at(file, member.offset, member.length).decode("ascii", "replace")

    try:
        label, index = read("cls"), read("index")
        return Scanned(
            None if index is None else _whole(index),
            None if label is None else _label(label),
            image.offset,
            image.length,
        )
    except ValueError as error:
        raise DataError(f"{file.place}: sample {name}: {error}") from error


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text.strip(), re.ASCII):
        raise ValueError(f"{text[:40]!r}, expected a whole number of 64 bits")
    return int(text)


def _label(text: str) -> int | list[float]:
    if not text.lstrip().startswith("["):
        return checked_label(_whole(text))
    return checked_label(load_json(text))


def checked_label(label: int | list[float]) -> Any:
    """A whole number from -1 on, or a list of finite ones from -1 on (as floats).

    Raises:
        ValueError: anything else.
    """
    for value in label if isinstance(label, list) else [label]:
        if type(value) not in (int, float) or not -1 <= value < 2**63:
            raise ValueError(f"a label of {str(value)[:40]}, expected numbers from -1 on")
    return [float(value) for value in label] if isinstance(label, list) else label
