"""Checkpoints written beside the training loop, one at a time.

The state is copied to the host at once; a thread of each rank then writes, flushes and hashes that rank's files, and a
thread of rank 0 makes them visible once all are there. Threads never talk to other ranks: the loop does, at its steps.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainers.engine import Ranks
from trainers.failures import TrainingError
from trainers.state import (
    CheckpointConfig,
    RunState,
    commit_draft,
    draft_path,
    find_checkpoint,
    remove_checkpoints,
    write_draft,
)

RETRY_MINUTES = 1.0  # after a write that failed
_POLL_SECONDS = 1.0  # how often ranks that wait for a write tell each other that they are there
_LEAVE_SECONDS = 30.0  # for which a process that failed waits for its write
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITE_FAILURES = (OSError, SafetensorError)  # full, read-only, over a quota, gone: the storage's fault, not ours


class CheckpointWriter:
    """All ranks call all methods at the same steps.

    Args:
        run_dir: the run's folder, on storage that all ranks share.
        permanent: checkpoints of a multiple of so many steps are never removed; None: all may be.
        say: called on every rank with what the user must know.
        written: called on every rank with the step of each checkpoint that has become visible.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        *,
        permanent: int | None = None,
        say: Callable[[str], None],
        written: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.run_dir, self.config, self.ranks, self.permanent = run_dir, config, ranks, permanent
        self._say, self._written = say, written
        self._phase: Literal["idle", "files", "commit"] = "idle"
        self._work: Future[Any] = _done()
        self._step = 0
        self._must = False
        self._failing_since: float | None = None
        self._next = time.monotonic() + self._minutes(config.every_minutes)

    @property
    def idle(self) -> bool:
        return self._phase == "idle"

    @property
    def pending(self) -> bool:
        """Whether this rank is still writing: to be brought to ``advance`` from all ranks together."""
        return not self._work.done()

    def due(self) -> bool:
        """Whether the clock asks for a checkpoint; rank 0's clock decides."""
        return self.ranks.is_main and self.idle and time.monotonic() >= self._next

    def write(self, state: RunState) -> None:
        """Begin to write a checkpoint of ``state``, as it is now; it may change as soon as this returns.

        Raises:
            TrainingError: as ``advance``.
        """
        self.finish()
        self._next = time.monotonic() + self._minutes(self.config.every_minutes)
        state, copied = snapshot(state)
        draft = draft_path(self.run_dir, state.step)

        def files() -> dict[str, str]:
            copied()
            return write_draft(draft, state, self.ranks.rank, self.ranks.world_size)

        self._phase, self._step, self._work = "files", state.step, _in_thread(files)
        if not self.config.background:
            self.finish()

    def write_now(self, state: RunState) -> None:
        """Write a checkpoint and return once it is in place.

        Raises:
            TrainingError: it could not be written.
        """
        self.finish()
        self._must = True
        try:
            self.write(state)
            self.finish()
        finally:
            self._must = False

    def finish(self) -> None:
        """Wait until nothing is being written."""
        while not self.idle:
            wait([self._work], timeout=_POLL_SECONDS)
            self.advance(self.ranks.any(self.pending))

    def leave(self) -> None:
        """After a failure: let the write under way end, and make it visible where that takes no other rank.

        A thread that is inside a library when the interpreter ends would abort the process: exit code 134.
        """
        while not self.idle:
            if not wait([self._work], timeout=_LEAVE_SECONDS).done or self.ranks.control is not None:
                return
            self.advance(False)

    def advance(self, pending: bool) -> None:
        """Go on with the write under way; ``pending`` is whether any rank was still writing at this step.

        Raises:
            TrainingError: the write failed, and none had succeeded for ``tolerate_minutes``.
        """
        if self.idle or pending:
            return
        sums, cause = self._outcome()
        if self._phase == "files":
            outcomes = self.ranks.to_main((sums, cause))
            cause = next((f"rank {rank}: {why}" for rank, (_, why) in enumerate(outcomes) if why), None)
            if self.ranks.is_main and cause is None:
                every_rank = [of_rank for of_rank, _ in outcomes]
                step, keep, permanent = self._step, self.config.keep, self.permanent
                self._work = _in_thread(lambda: commit_draft(self.run_dir, step, every_rank, keep, permanent))
        cause = self.ranks.from_main(cause)
        if cause is not None:
            self._phase = "idle"
            self._fail(cause)
        elif self._phase == "files":
            self._phase = "commit"
        else:
            self._phase, self._failing_since = "idle", None
            self._written(self._step)

    def _outcome(self) -> tuple[Any, str | None]:
        """(What this rank's thread returned, why it failed.) A failure that is not the storage's is raised."""
        error = self._work.exception()
        if error is None:
            return self._work.result(), None
        if isinstance(error, _WRITE_FAILURES):
            return None, str(error)
        raise error

    def _fail(self, cause: str) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        lasted = (now - self._failing_since) / 60
        fatal = self.ranks.from_main(self._must or lasted >= self.config.tolerate_minutes)
        self._next = now + 60 * min(RETRY_MINUTES, self.config.every_minutes or RETRY_MINUTES)
        last = self.ranks.from_main(self._clear_away(cause) if self.ranks.is_main else "")
        what = f"the checkpoint of step {self._step} could not be written to {self.run_dir} ({cause}); {last}"
        if fatal:
            raise TrainingError(f"{what}; the same command goes on from there once the storage can be written")
        left = self.config.tolerate_minutes - lasted
        self._say(
            f"warning: {what}. Training goes on and tries again; it ends if no checkpoint can be written"
            f" for {left:.0f} more minutes"
        )

    def _clear_away(self, cause: str) -> str:
        """Remove what was written and, if the disk is full, what it would have replaced; returns what is left."""
        try:
            shutil.rmtree(draft_path(self.run_dir, self._step), ignore_errors=True)
            whole = find_checkpoint(self.run_dir)
            if whole is None:
                return "there is none before it"
            if self.config.keep > 1 and any(os.strerror(code) in cause for code in _FULL):
                newest = int(whole.name.removeprefix("step-"))
                remove_checkpoints(self.run_dir, newest, self.config.keep - 1, self.permanent)
            return f"the last whole one is {whole.name}"
        except OSError as error:
            return f"those before it cannot be read now: {error}"

    @staticmethod
    def _minutes(minutes: float | None) -> float:
        return float("inf") if minutes is None else 60 * minutes


def snapshot(state: RunState) -> tuple[RunState, Callable[[], None]]:
    """A copy of all tensors in host memory, and what to call before they are read.

    Copies from a GPU go to pinned memory, behind the work queued so far and ahead of what will change the weights.
    """
    on_gpu = next((t.device for of in _groups(state) for t in of.values() if t.is_cuda), None)
    copies = replace(
        state,
        shared={name: _copies(tensors) for name, tensors in state.shared.items()},
        sharded={name: _copies(tensors) for name, tensors in state.sharded.items()},
    )
    if on_gpu is None:
        return copies, lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(on_gpu))
    return copies, event.synchronize


def _groups(state: RunState) -> list[dict[str, Tensor]]:
    return [*state.shared.values(), *state.sharded.values()]


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(value.detach()) for name, value in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    """In the tensor's own memory format: a GPU's copy engine cannot permute."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=tensor.is_cuda)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run in a thread that ends with the process, whatever it waits for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="twinstream-checkpoint", daemon=True).start()
    return future


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future
