"""The end of a conversion: tables, the manifest's figures, and the names that files have once all is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.packed.beton_writer import finish
from pipelines.packed.encode import Options
from pipelines.packed.journal import Journal, is_ours
from pipelines.packed.manifest import NAME, Manifest, Part, Range, Shard, Statistics
from pipelines.packed.table import Table, write_index
from pipelines.packed.worker import PARTIAL, data_path, write_file
from pipelines.stored.images import DataError

if TYPE_CHECKING:
    from pipelines.packed.conversion import PartSource, SetSource

SKIPPED = "skipped.jsonl"
_DRAFT = re.compile(rf"({re.escape(NAME)}|{re.escape(SKIPPED)})\.\d+\.tmp")


def finish_part(part: PartSource, journal: Journal, options: Options) -> Part:
    """Write the tables of a part whose images are all written."""
    entries = sorted((e for e in journal.entries if e["part"] == part.name), key=lambda entry: entry["chunk"])
    skipped = [one for entry in entries for one in entry["skipped"]]
    table = _table(part, entries)
    if not len(table):
        raise DataError(
            f"none of the {len(part.index):,} {part.name} images can be packed; the first: {skipped[0]['file']}: "
            f"{skipped[0]['reason']}"
        )
    shards = [Shard(**entry["shard"]) for entry in entries if entry["shard"]]
    if options.to == "ffcv":
        path = data_path(str(journal.destination), part.name, 0, options.to)
        columns = part.label.shape[1] if part.label.ndim == 2 else 0
        finish(path, table, int((table.offset + table.length).max()) + 4 * columns)
        shards = [
            Shard(
                name=os.path.basename(path).removesuffix(PARTIAL),
                samples=len(table),
                bytes=os.path.getsize(path),
                sha256=sha256(path),
            )
        ]
    else:
        write_file(str(journal.destination / f"{part.name}.index.npz{PARTIAL}"), write_index(table))
    encodings: Counter[str] = sum((Counter(entry["encodings"]) for entry in entries), Counter())
    mean, square = np.sum([entry["sums"] for entry in entries], axis=0) / len(table)
    # The least deviation is one grey level, as in `pixel_statistics`.
    std = np.sqrt(np.maximum(square - mean * mean, 1 / 255**2))
    return Part(
        count=len(table),
        skipped=len(skipped),
        shards=tuple(shards),
        height=_range(table.height),
        width=_range(table.width),
        kept=encodings["kept"],
        encoded=encodings["encoded"],
        raw=encodings["raw"],
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        class_counts=part.class_counts,
    )


def publish(
    source: SetSource, parts: dict[Any, Part], journal: Journal, options: Options, fingerprint: str
) -> Manifest:
    """Give the files their names; the manifest comes last."""
    statistics, train = source.statistics, parts.get("train")
    if statistics is None and source.measure and train is not None:
        alike = train.height.min == train.height.max and train.width.min == train.width.max
        side = min(train.height.min, train.width.min) if alike else 224
        statistics = Statistics(mean=train.mean, std=train.std, image_size=side)
    manifest = Manifest(
        source=source.name,
        classes=source.classes,
        options=asdict(options),
        chosen=source.chosen,
        fingerprint=fingerprint,
        statistics=statistics,
        parts=parts,
    )
    lines = [one for entry in journal.entries for one in entry["skipped"]]
    lines.sort(key=lambda one: (one["part"], one["index"]))
    for part in source.parts:
        lines += [
            {"file": file, "part": part.name, "index": None, "reason": reason} for file, reason in part.passed_over
        ]
    folder = journal.destination
    write_file(str(folder / SKIPPED), "".join(json.dumps(line) + "\n" for line in lines).encode())
    for path in sorted(folder.iterdir()):
        if is_ours(path.name, rf"({re.escape(PARTIAL)})?\.\d+\.tmp") or _DRAFT.fullmatch(path.name):
            path.unlink()  # a draft of a process that was killed
        elif is_ours(path.name, re.escape(PARTIAL)):
            path.rename(path.with_name(path.name.removesuffix(PARTIAL)))
    _sync_folder(folder)
    write_file(str(folder / NAME), manifest.dumps().encode())
    _sync_folder(folder)
    return manifest


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _table(part: PartSource, entries: list[dict[str, Any]]) -> Table:
    """All chunks as one table, in the order of the source."""
    shards = 0
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in _COLUMNS}
    for entry in entries:
        for name in _COLUMNS[:-1]:
            columns[name].append(entry["rows"][name])
        columns["shard"].append(np.full(len(entry["rows"]["index"]), shards))
        shards += entry["shard"] is not None
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return Table(
        index=joined["index"],
        label=part.label[np.searchsorted(part.index, joined["index"])],
        height=joined["height"].astype(np.int32),
        width=joined["width"].astype(np.int32),
        shard=joined["shard"].astype(np.int32),
        offset=joined["offset"],
        length=joined["length"],
        raw=joined["raw"].astype(bool),
    ).in_order()


_COLUMNS = ("index", "height", "width", "offset", "length", "raw", "shard")


def _range(sides: np.ndarray) -> Range:
    return Range(min=int(sides.min()), median=float(np.median(sides)), max=int(sides.max()))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
