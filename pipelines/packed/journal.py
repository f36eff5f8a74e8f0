"""An unfinished conversion: what it is to become, what of it is done, and who is at it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from pipelines.config import Section
from pipelines.foreign import read_text
from pipelines.packed.manifest import Shard
from pipelines.packed.worker import PARTIAL, write_file
from pipelines.stored.images import DataError

FOLDER = ".conversion"
_DATA = r"(train|test)(\.beton|\.index\.npz|-\d{5,}\.(tar|tfrecord|idx))"


class _Plan(Section):
    identity: dict[str, Any]
    settings: dict[str, int]


Counts = list[Annotated[int, Field(ge=0, lt=2**63)]]


class _Entry(Section):
    """What `worker.convert_chunk` returns: a finished chunk."""

    part: Literal["train", "test"]  # it becomes the name of a file
    chunk: int = Field(ge=0)
    rows: dict[Literal["index", "height", "width", "raw", "offset", "length"], Counts] = Field(min_length=6)
    shard: Shard | None
    encodings: dict[Literal["kept", "encoded", "raw"], int]
    sums: list[tuple[float, float, float]] = Field(min_length=2, max_length=2)
    skipped: list[dict[str, Any]]

    @model_validator(mode="after")
    def _as_many_in_all_columns(self) -> _Entry:
        if len({len(values) for values in self.rows.values()}) != 1:
            raise ValueError("its columns are not equally long")
        return self


class Journal:
    """The folder `.conversion` in the destination. Locked while in use; gone once the set is complete.

    Args:
        destination: made if it is not there; otherwise it must be empty, or hold an unfinished conversion.
        identity: what decides the result (JSON).

    Raises:
        DataError: the folder holds something else, or a conversion to something else (says the difference), or
            another process is at it.
    """

    def __init__(self, destination: Path, identity: dict[str, Any]) -> None:
        self.destination, self.folder = destination, destination / FOLDER
        self.entries: list[dict[str, Any]] = []  # one a finished chunk
        self.settings: dict[str, Any] = {}  # chosen at the start, kept when resumed
        self._identity = identity
        destination.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in destination.iterdir() if path.name != FOLDER)
        if others and not (self.folder / "plan.json").is_file():
            raise DataError(
                f"{destination} is not empty ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}) and holds no "
                "unfinished conversion; give an empty or a new folder"
            )
        self.folder.mkdir(exist_ok=True)
        self._lock = open(self.folder / "lock", "a")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(f"another process is converting into {destination}; wait for it or stop it") from error
        try:
            self._load()
        except BaseException:
            self._lock.close()
            raise

    @property
    def worker_lock(self) -> str:
        return str(self.folder / "workers.lock")

    @property
    def resumed(self) -> bool:
        return bool(self.settings)

    def start(self, settings: dict[str, Any]) -> None:
        """From here on the conversion can be resumed, with these settings."""
        self.settings = settings
        plan = {"identity": self._identity, "settings": settings}
        write_file(str(self.folder / "plan.json"), json.dumps(plan, indent=1).encode())

    def append(self, entry: dict[str, Any]) -> None:
        """Remember a finished chunk, for good: its data must be on the disk."""
        with open(self.folder / "journal.jsonl", "ab") as file:
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(_compact(entry))

    def close(self, *, finished: bool = False) -> None:
        if finished:
            shutil.rmtree(self.folder)
        self._lock.close()

    def _damaged(self, path: Path, error: Exception) -> DataError:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return DataError(f"{path} is damaged: {reason}; remove {self.destination} and begin again")

    def _load(self) -> None:
        plan = self.folder / "plan.json"
        if not plan.is_file():
            return
        try:
            told = _Plan.model_validate_json(read_text(plan))
        except (OSError, ValueError) as error:
            raise self._damaged(plan, error) from error
        refuse_difference(self.destination, "an unfinished conversion", told.identity, self._identity)
        with open(self.worker_lock, "a") as file:  # workers that outlived their parent finish what they are writing
            fcntl.flock(file, fcntl.LOCK_EX)
        self.settings = dict(told.settings)
        journal = self.folder / "journal.jsonl"
        if journal.is_file():
            whole, entries = 0, {}
            with open(journal, "rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # a kill may leave half a line
                    whole += len(line)
                    try:
                        entry = _compact(_Entry.model_validate_json(line).model_dump())
                    except ValueError as error:
                        raise self._damaged(journal, error) from error
                    # A chunk that was done twice, because its file was lost, counts as it was done last.
                    entries[entry["part"], entry["chunk"]] = entry
            os.truncate(journal, whole)
            self.entries = list(entries.values())
        for path in self.destination.iterdir():  # killed while the files got their names
            if is_ours(path.name):
                path.rename(path.with_name(path.name + PARTIAL))


def is_ours(name: str, ending: str = "") -> bool:
    """Whether a conversion gives this name to a file of images or their tables, with `ending` (a pattern) behind it."""
    return re.fullmatch(_DATA + ending, name) is not None


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """With the rows as arrays: lists of numbers take five times the memory."""
    rows = {name: np.array(values, dtype=np.int64) for name, values in entry["rows"].items()}
    return {**entry, "rows": rows}


_CHANGED = "the source's files or labels are not those of then; a file's new date counts as a change"


def refuse_difference(folder: Path, what: str, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise a DataError that tells how two conversions differ; return where they do not."""
    there, asked = (json.loads(json.dumps(_flat(settings))) for settings in (there, asked))
    differences = [
        _CHANGED if key == "fingerprint" else f"{key}: {there.get(key)!r} there, {asked.get(key)!r} now"
        for key in sorted({*there, *asked})
        if there.get(key) != asked.get(key)
    ]
    if differences:
        raise DataError(
            f"{folder} holds {what} of another kind ({'; '.join(differences)}); repeat the command that made it, "
            "give another folder, or remove this one"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value) if isinstance(value, dict) else {key: value}
    return out
