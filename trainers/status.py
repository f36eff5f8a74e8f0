"""``status.json`` in a run folder: what became of the run, for what started it.

torchrun turns every exit code into its own 1; ``tools.launch`` reads this file and turns it back. Rank 0 writes it: at
the start, at each checkpoint, and at the end. Standard library only, so that any process may read or write it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainers.companion.rank import LostPeerError

STATUS = "status.json"
LAUNCH = "launch"  # folder inside the run folder for what a launcher writes: scripts, host files, SLURM's output
EXIT_CODES = {"done": 0, "preempted": 75, "lost": 69, "failed": 1}  # of the states that are an end
EXIT_INTERRUPTED = 130  # a second Ctrl-C; "failed" as well
EXIT_REFUSED = 2  # a state of "failed" as well: the input was refused, another try would end alike


@dataclass(frozen=True)
class Status:
    """What the file says; ``step`` and ``epoch`` are those of the newest checkpoint."""

    state: str  # running, done, preempted, failed, lost
    step: int = 0
    epoch: int = 0
    checkpoint: str | None = None  # its name, such as step-00000040
    cause: str | None = None  # of failed and lost
    exit_code: int | None = None  # None while running
    rank: int | None = None  # which rank the cause is about, if it is known
    host: str = ""  # of rank 0
    pid: int = 0  # of rank 0
    updated: str = ""  # ISO 8601, UTC

    @property
    def ended(self) -> bool:
        return self.state in EXIT_CODES


def read_status(run_dir: Path) -> Status | None:
    """What the folder's ``status.json`` says; None if there is none that can be read."""
    try:
        values = json.loads((run_dir / STATUS).read_text())
        known = {field.name for field in fields(Status)}
        status = Status(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    sound = isinstance(status.state, str) and isinstance(status.exit_code, int | None)
    return status if sound else None


def begin_status(run_dir: Path) -> None:
    """This process is rank 0 of the run from now on; step and checkpoint stay what they were."""
    _write(run_dir, state="running", cause=None, exit_code=None, rank=None, host=socket.gethostname(), pid=os.getpid())


def record_checkpoint(run_dir: Path, step: int, epoch: int, checkpoint: str) -> None:
    """``checkpoint`` is whole and in its place."""
    _write(run_dir, step=step, epoch=epoch, checkpoint=checkpoint)


def end_status(run_dir: Path, exit_code: int, cause: str | None = None, rank: int | None = None) -> None:
    """The run ends with this exit code. The first end that is recorded stays: what follows it is its consequence."""
    before = read_status(run_dir)
    if before is None or not before.ended:
        if rank is None and (named := re.search(r"\brank (\d+) \((?:pid|host) ", cause or "")):
            rank = int(named[1])
        state = next((state for state, code in EXIT_CODES.items() if code == exit_code), "failed")
        _write(run_dir, state=state, exit_code=exit_code, cause=cause, rank=rank)


@contextmanager
def status_of(run_dir: Path, is_main: bool, refusals: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Record the run inside the block: that it began, and an exception that ends it; nothing unless ``is_main``.

    ``refusals`` are the exceptions that end in exit code 2.
    """
    if is_main:
        begin_status(run_dir)
    try:
        yield
    except BaseException as error:
        if is_main:
            code = EXIT_REFUSED if isinstance(error, refusals) else EXIT_CODES["failed"]
            if isinstance(error, LostPeerError):
                code = error.code
            elif isinstance(error, KeyboardInterrupt):
                code = EXIT_INTERRUPTED
            told = isinstance(error, (LostPeerError, *refusals)) or hasattr(error, "for_user")
            end_status(run_dir, code, str(error) if told else f"{type(error).__name__}: {error}")
        raise


def _write(run_dir: Path, **changes: Any) -> None:
    """The file as it is with ``changes``, replaced at once. What goes wrong is a warning, never the run's end."""
    values = asdict(read_status(run_dir) or Status("running"))
    values |= changes | {"updated": datetime.now(UTC).isoformat()}
    text = json.dumps(values, indent=1) + "\n"
    path = run_dir / STATUS
    draft = run_dir / f".{STATUS}.tmp"
    try:
        try:
            draft.write_text(text)
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            _write_over(path, text)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); the run goes on", stacklevel=3)


def _write_over(path: Path, text: str) -> None:
    """Into the blocks that the file has already: on a full disk there are no others, and the end is then told."""
    with path.open("r+") as file:
        file.write(text.rstrip().ljust(path.stat().st_size - 1) + "\n")
        file.truncate()
