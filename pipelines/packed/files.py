"""Bytes at a place in a large file, on this machine or behind a URL.

Objects that read hold names only, so they travel to worker processes as they are; open files belong to the process
(`_POOL`), are few, and may be read by several threads at once.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.stored.images import DataError

_PAUSES = 0.5, 2.0  # seconds between tries, where a server failed or a connection broke
_PATIENCE = 60.0  # seconds without a byte


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
        size = _remote(place, lambda system, path: system.info(path)["size"])
        if size is None:
            raise DataError(f"cannot read {place}: the server does not tell its size (no Content-Length); use another")
        return StoredFile(place, int(size))
    try:
        facts = os.stat(place)
    except OSError as error:
        raise DataError(f"cannot open {place}: {error.strerror}; check the path") from error
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"cannot open {place}: not a regular file; check the path")
    return StoredFile(place, facts.st_size, _version(facts))


def exists(place: str) -> bool:
    """Whether there is such a file.

    Raises:
        DataError: the URL's server does not say.
    """
    if is_url(place):
        try:
            return bool(_remote(place, lambda system, path: system.info(path)["type"] == "file"))
        except _AbsentError:
            return False
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
            check_version(file, descriptor)  # overwritten in place, it would give other pixels without a word
    if len(data) > length:
        raise DataError(
            f"{file.place}: the server sends {len(data):,} bytes where {length:,} are asked for: it does not know "
            "ranges; use one that does, or copy the folder here and set data.root"
        )
    if len(data) < length:
        raise DataError(
            f"{file.place}: ends after {offset + len(data):,} bytes, expected {file.size:,}; it was cut off"
        )
    return data


def read_whole(place: str) -> bytes:
    file = find_file(place)
    return read_at(file, 0, file.size)


def check_version(file: StoredFile, descriptor: int) -> None:
    if _version(os.fstat(descriptor)) != file.version:
        raise DataError(
            f"{file.place}: the file was changed, cut off or replaced while it was in use; put the old one back and run"
            " the same command again"
        )


def _version(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


class _AbsentError(DataError):
    """The server says that there is no such file: nothing else does."""


def _remote(place: str, action: Any) -> Any:
    """What `action` returns, of a file system and a path in it; tried again where another try may help."""
    for pause in (*_PAUSES, None):
        try:
            from fsspec.core import url_to_fs

            return action(*url_to_fs(place, **_timeouts(place)))
        except ImportError as error:  # fsspec's message names the package, say s3fs
            raise DataError(f"cannot open {place}: {error}") from error
        except Exception as error:  # every protocol has its own
            reason = _reason(error)
            if isinstance(reason, FileNotFoundError | NotADirectoryError):
                raise _AbsentError(f"cannot read {place}: it is not there; check the URL") from error
            if pause is None or _is_final(reason):
                said = str(reason) or ("no answer" if isinstance(reason, TimeoutError) else "the connection failed")
                raise DataError(
                    f"cannot read {place}: {type(reason).__name__}: {said}; check the URL, the rights and the network"
                ) from error
        time.sleep(pause)
    raise AssertionError


def _timeouts(place: str) -> dict[str, Any]:
    """Other protocols have sensible ones; over HTTP a silent server would be waited for five minutes."""
    protocols = re.findall(r"\b(https?)://", place)
    if not protocols:
        return {}
    from aiohttp import ClientTimeout

    patience = ClientTimeout(total=None, sock_connect=_PATIENCE, sock_read=_PATIENCE)
    settings = {"client_kwargs": {"timeout": patience}}
    return settings if place.startswith("http") else {protocols[0]: settings}


def _reason(error: BaseException) -> BaseException:
    """fsspec reports whatever happens over HTTP as a file that is not there; the true reason is its cause."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) not in (404, 410):
        return cause
    return error


def _is_final(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status < 500 and status != 429  # 429: too many requests at once
    # Asking again would give the same.
    return isinstance(error, PermissionError | IsADirectoryError | ValueError | TypeError | NotImplementedError)


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
