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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    every_epochs: float = Field(1.0, gt=0)  # may be a fraction; the last step is always saved
    keep: int = Field(3, ge=1)  # how many of the newest to keep


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


def save_checkpoint(run_dir: Path, state: RunState, ranks: Ranks, keep: int) -> Path:
    """Write ``state`` under ``checkpoints``, named by its step; all ranks call it and return once it is in place."""
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state.step:08d}"
    draft = folder / f".{final.name}.tmp"
    if ranks.is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    ranks.barrier()
    for name, tensors in state.sharded.items():
        _write_tensors(draft / _shard_name(name, ranks.rank), tensors)
    if ranks.is_main:
        for name, tensors in state.shared.items():
            _write_tensors(draft / f"{name}.safetensors", tensors)
        values = {
            **state.values,
            "format": FORMAT,
            "step": state.step,
            "world_size": ranks.world_size,
            "sharded": sorted(state.sharded),
        }
        _write_text(draft / "state.json", json.dumps(values, indent=1, sort_keys=True))
    ranks.barrier()
    if ranks.is_main:
        sums = {path.name: _sha256(path) for path in sorted(draft.iterdir())}
        _write_text(draft / "manifest.json", json.dumps(sums, indent=1))
        _sync_folder(draft)
        aside = folder / f".{final.name}.old"
        if final.exists():  # the same step again: it was found damaged, or nothing was trained since
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        os.replace(draft, final)
        shutil.rmtree(aside, ignore_errors=True)
        _point_last(folder, final.name)
        _sync_folder(folder)
        _prune(folder, final, keep)
    ranks.barrier()
    return final


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, made if need be, for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, or it cannot be used as a folder.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("w")
    except OSError as error:
        raise CheckpointError(f"run.dir={run_dir} cannot be used: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{run_dir} is in use by another process; wait for it, or stop it") from error
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
    """Read back what ``save_checkpoint`` wrote; raises CheckpointError if it was made by another number of ranks
    and holds per-rank shards."""
    with damage_named(path):
        values = check_state(load_json(read_text(path / "state.json")))
    if values["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {values['format']}; this version reads format {FORMAT}")
    sharded: dict[str, dict[str, Tensor]] = {}
    for name in values["sharded"]:
        if values["world_size"] == ranks.world_size:
            with damage_named(path):
                sharded[name] = load_tensors(path / _shard_name(name, ranks.rank))
        elif name == "loader":
            raise CheckpointError(
                f"{path} holds where DALI's own readers stood on {values['world_size']} ranks, this run has"
                f" {ranks.world_size}; resume with as many (data.reader=ours resumes on any number)"
            )
        elif name == "optimizer":
            raise CheckpointError(
                f"{path} holds the ZeRO shards of {values['world_size']} ranks, this run has {ranks.world_size};"
                " resume with as many, or use engine.zero_stage=0"
            )
    shards = {_shard_name(name, rank) for name in values["sharded"] for rank in range(values["world_size"])}
    with damage_named(path):
        files = sorted(file for file in path.glob("*.safetensors") if file.name not in shards)
        shared = {file.stem: load_tensors(file) for file in files}
    return RunState(values["step"], shared, sharded, values)


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
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep ``newest`` and the ``keep`` - 1 before it; what comes after it is of a future that was given up."""
    before = [path for path in _checkpoints(folder) if path.name < newest.name]
    kept = {newest.name, *(path.name for path in before[len(before) - keep + 1 :])}
    leftovers = folder.glob(".step-*")  # half-written drafts of killed processes
    for path in [*_checkpoints(folder), *leftovers]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


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
