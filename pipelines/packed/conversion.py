"""A set into one or a few large files: planned, spread over processes, and resumed where it was stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.packed.beton_writer import assign, data_start
from pipelines.packed.encode import BadImage, Options, encode
from pipelines.packed.finishing import finish_part, publish
from pipelines.packed.journal import FOLDER, Journal, refuse_difference
from pipelines.packed.manifest import Manifest, Statistics, read_manifest
from pipelines.packed.pool import run_tasks
from pipelines.packed.worker import CONTINUES, Chunk, dali_index_path, data_path, pack_chunk
from pipelines.stored.images import ArrayImages, DataError, FileImages, Images

_BETON_CHUNK = 64 << 20  # bytes
_TRIED = 64  # images encoded beforehand, to know how large the set will be


@dataclass(frozen=True, slots=True, eq=False)
class PartSource:
    """One part to be packed, as it is stored."""

    name: Literal["train", "test"]
    images: Images
    label: np.ndarray  # [N] int64 or [N, C] float32
    index: np.ndarray  # [N] int64, ascending
    class_counts: tuple[int, ...] | None
    passed_over: tuple[tuple[str, str], ...] = ()  # (file, reason): never taken for images


@dataclass(frozen=True, slots=True, eq=False)
class SetSource:
    """A set to be packed."""

    name: str
    classes: tuple[str, ...]
    parts: tuple[PartSource, ...]
    statistics: Statistics | None  # None: known for this set, or to be measured on what is packed
    measure: bool = False
    chosen: bool = False  # its classes are some of more, by data.class_list
    folder: Path | None = None  # that holds the set and nothing else, so that nothing is to be written there

    def fingerprint(self) -> str:
        """Hash of labels, positions, and names, sizes and dates of files (or pixels of arrays)."""
        digest = hashlib.blake2b("\0".join((self.name, *self.classes)).encode(), digest_size=16)
        for part in self.parts:
            for array in (part.label, part.index):
                digest.update(f"{part.name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
            _feed(part.images, digest)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a conversion will take."""

    images: int
    bytes: int  # of the whole result
    written: int  # of these, already there
    free: int  # on the disk


@dataclass(frozen=True, slots=True)
class Result:
    manifest: Manifest
    already_done: bool


def convert(
    source: SetSource,
    destination: Path,
    options: Options,
    *,
    workers: int,
    planned: Callable[[Estimate], None] = lambda estimate: None,
    progress: Callable[[int], None] = lambda images: None,
) -> Result:
    """Pack `source` into the folder `destination`.

    Args:
        workers: processes; 0: only this one.
        planned: told the size before the work starts.
        progress: told the number of images done, again and again; those of an earlier attempt first.

    Raises:
        DataError: it would not fit on the disk, cannot be written, the destination holds something else, or no image
            can be packed.
        WorkerError: a worker process failed or died; the same call resumes.
    """
    options = options.settled()
    _refuse_inside(source, destination)
    fingerprint = source.fingerprint()
    identity = {
        "source": source.name,
        "options": asdict(options),
        "parts": {part.name: len(part.index) for part in source.parts},
        "fingerprint": fingerprint,
    }
    done = read_manifest(str(destination)) if destination.is_dir() else None
    if done is not None:
        counts = {name: part.count + part.skipped for name, part in done.parts.items()}
        there = {"source": done.source, "options": done.options, "parts": counts, "fingerprint": done.fingerprint}
        refuse_difference(destination, "a finished conversion", there, identity)
        shutil.rmtree(destination / FOLDER, ignore_errors=True)  # left where a kill came at the very end
        return Result(done, already_done=True)
    journal = Journal(destination, identity)
    try:
        return Result(_convert(source, journal, options, fingerprint, workers, planned, progress), already_done=False)
    except OSError as error:
        place = error.filename or destination
        raise DataError(f"cannot write {place}: {error.strerror or error}; {CONTINUES}") from error
    finally:
        journal.close()


def _refuse_inside(source: SetSource, destination: Path) -> None:
    """What is written into a folder of images would be taken for images, or for a class of its own."""
    folders = [source.folder] if source.folder is not None else []
    folders += [part.images.root for part in source.parts if isinstance(part.images, FileImages)]
    there = destination.resolve()
    for folder in folders:
        if there == folder.resolve() or folder.resolve() in there.parents:
            raise DataError(
                f"the destination {destination} is the source's folder {folder}, or inside of it; give a folder "
                "elsewhere"
            )


def _convert(
    source: SetSource,
    journal: Journal,
    options: Options,
    fingerprint: str,
    workers: int,
    planned: Callable[[Estimate], None],
    progress: Callable[[int], None],
) -> Manifest:
    planned(_plan(journal, source, options))
    _drop_lost(journal, options)
    progress(sum(len(entry["rows"]["index"]) + len(entry["skipped"]) for entry in journal.entries))
    _pack(journal, source, options, workers, progress)
    parts = {part.name: finish_part(part, journal, options) for part in source.parts}
    manifest = publish(source, parts, journal, options, fingerprint)
    journal.close(finished=True)
    return manifest


def _plan(journal: Journal, source: SetSource, options: Options) -> Estimate:
    """Sizes of the chunks, decided once; refused where the result cannot fit."""
    if not journal.resumed:
        total = 0
        settings: dict[str, Any] = {}
        for part in source.parts:
            mean = _mean_bytes(part, options, sum(len(part.index) for part in source.parts))
            total += mean * len(part.index)
            if options.to == "ffcv":
                # Small sets are cut finer, so that all workers have something to do.
                size = min(_BETON_CHUNK // mean, max(64, -(-len(part.index) // 64)))
            else:
                size = (options.shard_mb << 20) // mean
            settings[part.name] = max(1, size)
        settings["bytes"] = total
    else:
        settings = journal.settings
        if not {"bytes", *(part.name for part in source.parts)} <= settings.keys() or min(settings.values()) < 1:
            raise DataError(f"{journal.folder}/plan.json is damaged; remove {journal.destination} and begin again")
    written = sum(path.stat().st_size for path in journal.destination.iterdir() if path.is_file())
    free = shutil.disk_usage(journal.destination).free
    estimate = Estimate(sum(len(part.index) for part in source.parts), settings["bytes"], written, free)
    if estimate.bytes - written > free:
        raise DataError(
            f"the result takes about {estimate.bytes / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free at "
            f"{journal.destination}; free some, give another folder, or a smaller --max-side or --quality"
        )
    if not journal.resumed:
        journal.start(settings)
    return estimate


def _mean_bytes(part: PartSource, options: Options, total: int) -> int:
    tried = np.linspace(0, len(part.index) - 1, max(8, _TRIED * len(part.index) // total)).astype(int)
    lengths = []
    for row in np.unique(tried).tolist():
        try:
            lengths.append(len(encode(part.images, row, int(part.index[row]), options).data))
        except BadImage:
            continue  # reported when its turn comes
    around = {"ffcv": 64, "webdataset": 6 * 512, "tfrecord": 160}[options.to]
    return int(np.mean(lengths or [100_000])) + around + 4 * (part.label.size // len(part.index))


def _drop_lost(journal: Journal, options: Options) -> None:
    """Forget chunks whose files are not there any more, or not whole: somebody removed them."""

    def whole(entry: dict[str, Any]) -> bool:
        rows, path = entry["rows"], data_path(str(journal.destination), entry["part"], entry["chunk"], options.to)
        if not len(rows["index"]):
            return True
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if entry["shard"]:
            return size == entry["shard"]["bytes"] and dali_index_path(Path(path)).is_file()
        return bool(size >= (rows["offset"] + rows["length"]).max())

    journal.entries = [entry for entry in journal.entries if whole(entry)]


def _pack(journal: Journal, source: SetSource, options: Options, workers: int, progress: Callable[[int], None]) -> None:
    cursors: dict[str, int] = {}
    for part in source.parts:
        columns = part.label.shape[1] if part.label.ndim == 2 else None
        behind = 4 * (columns or 0)
        cursors[part.name] = max(
            [data_start(len(part.index), columns)]
            + [
                int((entry["rows"]["offset"] + entry["rows"]["length"]).max()) + behind
                for entry in journal.entries
                if entry["part"] == part.name and len(entry["rows"]["index"])
            ]
        )
        if options.to == "ffcv":
            path = Path(data_path(str(journal.destination), part.name, 0, options.to))
            path.touch()

    def place(question: tuple[str, Sequence[int]]) -> list[int]:
        name, lengths = question
        places = assign(cursors[name], lengths)
        if places:
            cursors[name] = places[-1] + lengths[-1]
        return places

    for entry in run_tasks(_chunks(journal, source, options), pack_chunk, workers, answer=place, progress=progress):
        journal.append(entry)


def _chunks(journal: Journal, source: SetSource, options: Options) -> Iterator[Chunk]:
    """What is left to do."""
    done = {(entry["part"], entry["chunk"]) for entry in journal.entries}
    for part in source.parts:
        count, size = len(part.index), journal.settings[part.name]
        order = np.arange(count)
        if options.to != "ffcv" and options.shuffle is not None:
            order = np.random.RandomState(options.shuffle).permutation(count)
        for number, start in enumerate(range(0, count, size)):
            rows = order[start : start + size]
            if (part.name, number) not in done:
                yield Chunk(
                    str(journal.destination),
                    journal.worker_lock,
                    part.name,
                    number,
                    _portable(part.images, rows),
                    part.index[rows],
                    part.label[rows],
                    options,
                )


def _portable(images: Images, rows: np.ndarray) -> Images:
    """These images alone: a worker is sent no array that it does not need."""
    chosen = images.select(rows)
    pixels = chosen.array
    return chosen if pixels is None else ArrayImages(np.ascontiguousarray(pixels))


def _feed(images: Images, digest: Any) -> None:
    if not isinstance(images, FileImages):
        images.feed(digest, times=False)
        return
    folder = os.fsencode(images.root)
    for name in images.names.tolist():
        try:
            facts = os.stat(os.path.join(folder, name))
            told = f"|{facts.st_size}|{facts.st_mtime_ns}"
        except OSError:
            told = "|-1"  # reported when its turn comes
        digest.update(name + told.encode())
