"""Checkpoints: everything that the run is, written so that a kill at any moment loses nothing but the steps since.

A checkpoint is a folder such as ``checkpoints/step-00000040``, of safetensors and JSON, never a pickle. It is written
under a temporary name, flushed to the disk, and renamed; ``manifest.json`` holds every file's SHA-256, so a damaged
folder is noticed and the one before it used. ``checkpoints/last`` points to the newest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pipelines.config import Section
from pipelines.foreign import check_regular, load_json, printable, read_text
from pipelines.stored.images import DataError
from trainers.engine import Ranks
from trainers.weights import check_state, load_tensors, save_tensors

FORMAT = 1
LOCK = ".lock"


class CheckpointConfig(Section):
    every_epochs: float | None = Field(1.0, gt=0)  # may be a fraction; null: off. The last step is always saved
    every_steps: int | None = Field(None, ge=1)  # as well as that; null: off
    every_minutes: float | None = Field(30.0, gt=0)  # and when none was begun for so long; null: off
    keep: int = Field(3, ge=1)  # how many of the newest to keep
    keep_every_epochs: int | None = Field(None, ge=1)  # those of every so many epochs are never removed; null: off
    background: bool = True  # written while training goes on; false: training waits
    tolerate_minutes: float = Field(60.0, ge=0)  # a write that fails is a warning, until all have failed for so long


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not belong to this run; the message says which file and why."""

    def __str__(self) -> str:
        return printable(super().__str__())


@dataclass(slots=True)
class RunState:
    """What is saved: tensors by file name, and plain values."""

    step: int
    shared: dict[str, dict[str, Tensor]]  # the same on all ranks; written by rank 0, one file each
    sharded: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # each rank's own, one file a rank
    values: dict[str, Any] = field(default_factory=dict)  # JSON
    # Read on another number of ranks: the shards of all ranks that wrote, in their order.
    all_shards: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)


def save_checkpoint(run_dir: Path, state: RunState, ranks: Ranks, keep: int) -> Path:
    """Write ``state`` under ``checkpoints``, named by its step; all ranks call it and return once it is in place."""
    draft = draft_path(run_dir, state.step)
    if ranks.is_main:
        shutil.rmtree(draft, ignore_errors=True)
    ranks.barrier()
    sums = ranks.to_main(write_draft(draft, state, ranks.rank, ranks.world_size))
    if ranks.is_main:
        commit_draft(run_dir, state.step, sums, keep)
    ranks.barrier()
    return checkpoint_path(run_dir, state.step)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def draft_path(run_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return run_dir / "checkpoints" / f".step-{step:08d}.tmp"


def write_draft(draft: Path, state: RunState, rank: int, world_size: int) -> dict[str, str]:
    """Write and flush this rank's files of a checkpoint; returns their SHA-256 by name. Talks to no other rank."""
    draft.mkdir(parents=True, exist_ok=True)
    files = {_shard_name(name, rank): tensors for name, tensors in state.sharded.items()}
    if rank == 0:
        files |= {f"{name}.safetensors": tensors for name, tensors in state.shared.items()}
    for name, tensors in files.items():
        _write_tensors(draft / name, tensors)
    names = list(files)
    if rank == 0:
        values = {
            **state.values,
            "format": FORMAT,
            "step": state.step,
            "world_size": world_size,
            "sharded": sorted(state.sharded),
        }
        _write_text(draft / "state.json", json.dumps(values, indent=1, sort_keys=True))
        names.append("state.json")
    return {name: _sha256(draft / name) for name in names}


def commit_draft(run_dir: Path, step: int, sums: list[dict[str, str]], keep: int, permanent: int | None = None) -> None:
    """Make a draft with the files of all ranks (``sums``) the newest checkpoint, and remove those no longer kept.

    Args:
        keep: how many of the newest to keep.
        permanent: checkpoints of a multiple of so many steps are kept as well.
    """
    draft, final = draft_path(run_dir, step), checkpoint_path(run_dir, step)
    folder = final.parent
    manifest = {name: sha for of_rank in sums for name, sha in of_rank.items()}
    _write_text(draft / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
    _sync_folder(draft)
    aside = folder / f".{final.name}.old"
    if final.exists():  # the same step again: it was found damaged, or nothing was trained since
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(draft, final)
    shutil.rmtree(aside, ignore_errors=True)
    _point_last(folder, final.name)
    _sync_folder(folder)
    remove_checkpoints(run_dir, step, keep, permanent)


def remove_checkpoints(run_dir: Path, newest: int, keep: int, permanent: int | None = None) -> None:
    """Keep that of step ``newest``, the ``keep`` - 1 before it, and the permanent ones.

    What comes after it is of a future that was given up; drafts are of processes that were killed.
    """
    folder = run_dir / "checkpoints"
    before = [path for path in _checkpoints(folder) if _step_of(path) < newest]
    kept = {checkpoint_path(run_dir, newest), *before[len(before) - keep + 1 :]}
    kept |= {path for path in before if permanent and _step_of(path) % permanent == 0}
    for path in [*_checkpoints(folder), *folder.glob(".step-*")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def remove_drafts(run_dir: Path) -> None:
    """Clear away what killed processes left half-written."""
    for path in (run_dir / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, made if need be, for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise CheckpointError(f"run.dir={run_dir} cannot be used: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip()
            by = f" ({holder})" if holder else ""
            raise CheckpointError(f"{run_dir} is in use by another process{by}; wait for it, or stop it") from error
        except OSError as error:
            raise CheckpointError(f"{run_dir / LOCK} cannot be locked: {error}; choose another run.dir") from error
        for path in (run_dir / "checkpoints", run_dir / "metrics.jsonl", run_dir / "tensorboard"):
            if path.exists() and not os.access(path, os.W_OK):
                raise CheckpointError(f"run.dir={run_dir} cannot be used: {path} is not writable")
        with suppress(OSError):  # a full disk: who holds it is then not said
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}")
            file.flush()
        yield


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; warns of every damaged one it passes over. None if there is none."""
    for path in reversed(_checkpoints(run_dir / "checkpoints")):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is damaged ({problem}); trying the checkpoint before it", stacklevel=2)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has the checksum in its manifest."""
    try:
        sums = load_json(read_text(path / "manifest.json"))
        present = {file.name for file in path.iterdir()} - {"manifest.json"}
        if set(sums) != present:
            return f"files differ from the manifest: {', '.join(sorted(set(sums) ^ present))}"
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"checksum of {name} does not match"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"manifest.json: {error}"
    return None


def load_checkpoint(path: Path, ranks: Ranks) -> RunState:
    """Read back what ``save_checkpoint`` wrote.

    On another number of ranks, ``sharded`` is left empty but for ``optimizer``: ``all_shards`` has those of every
    rank that wrote it.

    Raises:
        CheckpointError: it is of another format, or holds what only as many ranks can go on from.
    """
    with damage_named(path):
        values = check_state(load_json(read_text(path / "state.json")))
    if values["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {values['format']}; this version reads format {FORMAT}")
    sharded: dict[str, dict[str, Tensor]] = {}
    all_shards: dict[str, list[dict[str, Tensor]]] = {}
    writers = values["world_size"]
    for name in values["sharded"]:
        if writers == ranks.world_size:
            with damage_named(path):
                sharded[name] = load_tensors(path / _shard_name(name, ranks.rank))
        elif name == "loader":
            raise CheckpointError(
                f"{path} holds where DALI's own readers stood on {writers} ranks, this run has"
                f" {ranks.world_size}; resume with as many (data.reader=ours resumes on any number)"
            )
        elif name == "optimizer":
            with damage_named(path):
                all_shards[name] = [load_tensors(path / _shard_name(name, rank)) for rank in range(writers)]
    shards = {_shard_name(name, rank) for name in values["sharded"] for rank in range(writers)}
    with damage_named(path):
        files = sorted(file for file in path.glob("*.safetensors") if file.name not in shards)
        shared = {file.stem: load_tensors(file) for file in files}
    return RunState(values["step"], shared, sharded, values, all_shards)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What goes wrong with the content of a checkpoint, as a CheckpointError: the checksums are no proof of origin."""
    try:
        yield
    except (CheckpointError, DataError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} holds something else than a run writes: {reason}") from error


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def load_strict(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """``load_state_dict`` whose complaint names every missing, unexpected and misshapen tensor in one message."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{what} does not fit the model: {shown}{more}")
    module.load_state_dict(tensors, strict=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _shard_name(name: str, rank: int) -> str:
    return f"{name}-rank-{rank:05d}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(path, tensors)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _point_last(folder: Path, name: str) -> None:
    draft = folder / ".last.tmp"
    draft.unlink(missing_ok=True)
    draft.symlink_to(name)
    os.replace(draft, folder / "last")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
