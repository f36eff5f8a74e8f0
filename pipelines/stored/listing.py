"""The image files below a folder, and what lies among them; nothing is passed over in silence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.stored.images import EXTENSIONS, DataError

_MOST_WAYS = 100  # by which links may lead to one folder
Inode = tuple[int, int]  # device and number


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted, without hidden ones and links that lead back up.

    Raises:
        DataError: the folder cannot be listed, or a name is not UTF-8.
    """
    names = next(_walk(str(folder), _above(folder))).folders
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{folder}: the class folder {os.fsencode(name)!r} is not UTF-8; rename the folder"
            ) from error
    return tuple(name for name in names if name[0] != ".")


def image_names(folder: Path, below: str) -> list[str]:
    """Paths of the image files under folder/below, relative to `folder`, sorted, without hidden ones.

    Raises:
        DataError: a folder cannot be listed: its images would be missing.
    """
    above, found = _above(folder), []
    if below:
        above |= {_inode(str(folder))}
    for level in _walk(str(folder / below), above):
        level.folders[:] = [name for name in level.folders if name[0] != "."]
        prefix = os.path.relpath(level.path, folder)
        for name in level.files:
            if name.lower().endswith(EXTENSIONS) and name[0] != ".":
                found.append(name if prefix == "." else f"{prefix}/{name}")
    return sorted(found)


def left_out(folder: Path, classes: Collection[str] | None = None) -> list[tuple[str, str]]:
    """(path, reason) of what lies below `folder` and is no image of its classes; other class folders aside.

    Args:
        folder: the folder.
        classes: its class folders; None where it has none.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = []
    wanted = None if classes is None else set(classes)
    for level in _walk(str(folder), _above(folder)):
        top = Path(level.path) == folder
        if top and wanted is not None:
            level.folders[:] = [name for name in level.folders if name in wanted or name[0] == "."]
        hidden_folder = any(part[0] == "." for part in Path(level.path).relative_to(folder).parts)
        found += [(os.path.join(level.path, name), "a link to a folder that it lies in") for name in level.loops]
        for name in sorted(level.files):
            path = os.path.join(level.path, name)
            if name[0] == "." or hidden_folder:
                found.append((path, "hidden"))
            elif not name.lower().endswith(EXTENSIONS):
                found.append((path, "not an image by its name"))
            elif top and wanted is not None:
                found.append((path, "outside of the class folders"))
    return found


@dataclass(frozen=True, slots=True)
class _Level:
    path: str
    folders: list[str]  # whoever walks may remove some before going on
    files: list[str]
    loops: list[str]  # links to a folder that is being walked


def _walk(path: str, above: frozenset[Inode]) -> Iterator[_Level]:
    """`path` and every folder below it, links followed; `above`: what holds it."""
    waiting = [(path, above)]
    ways: Counter[Inode] = Counter()
    while waiting:
        path, above = waiting.pop()
        above |= {_inode(path)}
        level = _Level(path, [], [], [])
        for entry in _entries(path):
            if not _is_folder(entry):
                level.files.append(entry.name)
            elif not entry.is_symlink():
                level.folders.append(entry.name)
            elif (inode := _inode(entry.path)) in above:  # only a link can lead back
                level.loops.append(entry.name)
            else:
                level.folders.append(entry.name)
                ways[inode] += 1
                if ways[inode] > _MOST_WAYS:  # folders of links to folders of links: there is no end to it
                    raise DataError(f"more than {_MOST_WAYS} links lead to the folder {entry.path}; remove them")
        level.folders.sort()
        yield level
        waiting += [(os.path.join(path, name), above) for name in reversed(level.folders)]


def _above(folder: Path) -> frozenset[Inode]:
    return frozenset(_inode(str(parent)) for parent in folder.resolve().parents)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise _unlisted(path, error) from error


def _inode(path: str) -> Inode:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise _unlisted(path, error) from error
    return facts.st_dev, facts.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no image either, and reported as such when it is read
        return False


def _unlisted(path: str, error: OSError) -> DataError:
    return DataError(
        f"cannot list the folder {path}: {error.strerror}; its images would be missing: make it readable, or take it "
        "out of the set"
    )
