"""The loop: batches in, steps out, everything else at its interval."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file

from pipelines.batch import ViewBatch
from pipelines.loading import Loader
from pipelines.sources import DataError
from pipelines.unchanged import data_fingerprint, is_other_data
from trainers.engine import Engine
from trainers.methods import BaseMethod
from trainers.monitors import Monitor
from trainers.nonfinite import NonfiniteGuard
from trainers.runlog import RunLog
from trainers.state import (
    CheckpointConfig,
    CheckpointError,
    RunState,
    find_checkpoint,
    generator_states,
    load_checkpoint,
    load_strict,
    restore_generators,
    save_checkpoint,
)

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint was written, the same command goes on from it


@dataclass(slots=True)
class Run:
    """The parts of a run, built by ``train.py``."""

    directory: Path
    epochs: int
    method: BaseMethod
    engine: Engine
    loader: Loader
    schedule: Callable[[int], float]
    monitor: Monitor
    log: RunLog
    checkpoint: CheckpointConfig
    export: dict[str, Any]  # what a reader of the exported encoder must know: architecture, stem, size, statistics


def pretrain(run: Run) -> int:
    """Train to the end, from the newest whole checkpoint if there is one; returns the exit code of the process.

    0 when done; EXIT_PREEMPTED after SIGTERM or SIGINT, once a checkpoint is written.
    """
    ranks, log = run.engine.ranks, run.log
    steps_per_epoch = run.loader.steps_per_epoch
    total = run.epochs * steps_per_epoch
    step = _resume(run)
    log.open(step)
    guard = NonfiniteGuard(run.engine, run.method, run.loader, run.directory, log)
    stop = _StopSignal()
    log_every = log.config.every_steps
    evaluate_every = max(1, round(run.monitor.config.every_epochs * steps_per_epoch))
    save_every = max(1, round(run.checkpoint.every_epochs * steps_per_epoch))
    run.method.train()
    log.restart_clock()
    try:
        while step < total:
            epoch, first_step = divmod(step, steps_per_epoch)
            for micro_batches, waited in _timed(run.loader.epoch(epoch, first_step)):
                lr = run.schedule(step)
                log.add(guard.step(step + 1, micro_batches, lr, run.monitor.observe), waited)
                step += 1
                done = step / steps_per_epoch

                if step % log_every == 0 or step == total:
                    log.write_step(step, done, lr)
                if step % evaluate_every == 0 or step == total:
                    guard.look()
                    run.engine.average_running_statistics()
                    if scores := run.monitor.evaluate():
                        log.write_scores(step, done, scores)
                    log.restart_clock()
                preempted = ranks.any(stop.requested)
                if step % save_every == 0 or step == total or preempted:
                    guard.before_save(step)
                    save(run, step)
                    log.restart_clock()
                if preempted and step < total:
                    log.say(f"stopped by {stop.name} at step {step}; the same command resumes")
                    return EXIT_PREEMPTED
        if ranks.is_main:
            _export_encoder(run)
        ranks.barrier()
        return 0
    finally:
        stop.restore()
        run.loader.close()
        log.close()


def save(run: Run, step: int) -> None:
    """Write everything that the run is as a checkpoint."""
    run.engine.average_running_statistics()
    ranks = run.engine.ranks
    shared = {"method": dict(run.method.state_dict()), "meters": run.log.state(), **run.monitor.state()}
    sharded = {"generators": generator_states(ranks.device)}
    if (loader_state := run.loader.state()) is not None:
        sharded["loader"] = {"state": loader_state}
    (sharded if run.engine.config.zero_stage else shared)["optimizer"] = run.engine.optimizer_state()
    values = {
        "epoch": step // run.loader.steps_per_epoch,
        "step_in_epoch": step % run.loader.steps_per_epoch,
        "images": len(run.loader.source),
        "data": data_fingerprint(run.loader.source) if ranks.is_main else None,
        "encoder": run.export,
        "recipe": (run.directory / "recipe.yaml").read_text(),
    }
    save_checkpoint(run.directory, RunState(step, shared, sharded, values), ranks, run.checkpoint.keep)


def _resume(run: Run) -> int:
    """Restore the newest whole checkpoint; returns the step to go on from."""
    ranks = run.engine.ranks
    data = ranks.from_main(data_fingerprint(run.loader.source) if ranks.is_main else None)
    path = ranks.from_main(find_checkpoint(run.directory) if ranks.is_main else None)
    if path is None:
        return 0
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there on rank {ranks.rank}; run.dir must be on storage that all ranks share"
        )
    state = load_checkpoint(path, ranks)
    images = len(run.loader.source)
    if state.values["images"] != images:
        raise CheckpointError(
            f"{path} was trained on {state.values['images']} images, {run.loader.source.name} now has {images}: order"
            " and schedule would change in the middle; restore the images, or start anew with another run.dir"
        )
    if is_other_data(state.values.get("data"), data):
        raise CheckpointError(
            f"{path} was trained on other images than {run.loader.source.name} now has, though as many: files have"
            " other names or sizes than then; restore them, or start anew with another run.dir"
        )
    load_strict(run.method, state.shared["method"], f"{path}/method.safetensors")
    optimizer = state.sharded if run.engine.config.zero_stage else state.shared
    try:
        run.engine.load_optimizer_state(optimizer["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    run.log.load(state.shared["meters"], ranks.device)
    run.monitor.load(state.shared)
    if "generators" in state.sharded:
        restore_generators(state.sharded["generators"], ranks.device)
    if "loader" in state.sharded:
        try:
            run.loader.load_state(state.sharded["loader"]["state"])
        except DataError as error:
            raise CheckpointError(f"{path}: {error}") from error
    run.log.say(f"resuming from {path} (step {state.step})")
    return state.step


def _timed(batches: Iterator[list[ViewBatch]]) -> Iterator[tuple[list[ViewBatch], float]]:
    """Each item with the seconds that the consumer waited for it."""
    while True:
        start = time.perf_counter()
        item = next(batches, None)
        if item is None:
            return
        yield item, time.perf_counter() - start


def _export_encoder(run: Run) -> None:
    """``encoder.safetensors``: torchvision's parameter names and, as metadata, how to rebuild and feed it."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in run.method.encoder.state_dict().items()}
    draft = run.directory / ".encoder.safetensors.tmp"
    save_file(tensors, draft, metadata={"twinstream": json.dumps(run.export)})
    draft.replace(run.directory / "encoder.safetensors")


class _StopSignal:
    """Notes SIGTERM and SIGINT, to be acted on between steps; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal on another rank"
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
