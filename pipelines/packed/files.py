"""Bytes at a place in a large file, on this machine or behind a URL.

Objects that read hold names only, so they travel to worker processes as they are; open files belong to the process
(`_POOL`), are few, and may be read by several threads at once.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.stored.images import DataError


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file whose size is known, and what would betray that another one took its place."""

    place: str  # a path or a URL
    size: int  # bytes
    version: tuple[int, int, int] | None = None  # device, inode, time of change in ns; None behind a URL


def is_url(place: str) -> bool:
    return "://" in place or "::" in place


def find_file(place: str | Path) -> StoredFile:
    """The file at a path or URL.

    Raises:
        DataError: it is not there, cannot be reached, or the URL's protocol needs a package that is not installed.
    """
    place = os.fspath(place)
    if is_url(place):
        return StoredFile(place, _remote(place, lambda system, path: int(system.info(path)["size"])))
    try:
        facts = os.stat(place)
    except OSError as error:
        raise DataError(f"cannot open {place}: {error.strerror}; check the path") from error
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"cannot open {place}: not a regular file; check the path")
    return StoredFile(place, facts.st_size, _version(facts))


def exists(place: str) -> bool:
    if is_url(place):
        return bool(_remote(place, lambda system, path: system.isfile(path)))
    return os.path.isfile(place)


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def read_at(file: StoredFile, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on; behind a URL by a request for just this range.

    Raises:
        DataError: the range is not inside the file, or the file was changed since it was found.
    """
    if offset < 0 or length < 0 or offset + length > file.size:
        raise DataError(f"{file.place}: bytes {offset:,} to {offset + length:,} of a file of {file.size:,}")
    if is_url(file.place):
        data = _remote(file.place, lambda system, path: system.cat_file(path, start=offset, end=offset + length))
    else:
        with _POOL.descriptor(file) as descriptor:
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # one call reads 2 GiB at most
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
    if len(data) != length:
        raise DataError(
            f"{file.place}: ends after {offset + len(data):,} bytes, expected {file.size:,}; it was cut off"
        )
    return data


def read_whole(place: str) -> bytes:
    file = find_file(place)
    return read_at(file, 0, file.size)


def check_version(file: StoredFile, descriptor: int) -> None:
    if _version(os.fstat(descriptor)) != file.version:
        raise DataError(f"{file.place}: the file was changed or replaced while it was in use; start again")


def _version(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


def _remote(place: str, action: Any) -> Any:
    try:
        from fsspec.core import url_to_fs

        return action(*url_to_fs(place))
    except ImportError as error:  # fsspec's message names the package, say s3fs
        raise DataError(f"cannot open {place}: {error}") from error
    except Exception as error:  # every protocol has its own
        raise DataError(
            f"cannot read {place}: {type(error).__name__}: {error}; check the URL and the network"
        ) from error


class _OpenFiles:
    """The open files of this process: the last `limit` used and those in use."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._entries: OrderedDict[StoredFile, list[int]] = OrderedDict()  # [descriptor, users]

    @contextmanager
    def descriptor(self, file: StoredFile) -> Iterator[int]:
        if self._process != os.getpid():  # forked: another thread may have held the lock at that moment
            self._start()
        with self._lock:
            entry = self._entries.pop(file, None) or [self._open(file), 0]
            self._entries[file] = entry
            entry[1] += 1
            if len(self._entries) > self._limit:
                idle = next((key for key, (_, users) in self._entries.items() if users == 0), None)
                if idle is not None:
                    os.close(self._entries.pop(idle)[0])
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def _open(self, file: StoredFile) -> int:
        try:
            descriptor = os.open(file.place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot open {file.place}: {error.strerror}; was it moved?") from error
        try:
            check_version(file, descriptor)
        except DataError:
            os.close(descriptor)
            raise
        return descriptor


_POOL = _OpenFiles()
