"""The loop: batches in, steps out, everything else at its interval."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipelines.batch import ViewBatch
from pipelines.loading import Loader
from pipelines.sources import DataError
from pipelines.unchanged import data_fingerprint, is_other_data
from trainers.checkpoint_writer import CheckpointWriter
from trainers.elastic import elastic_remarks
from trainers.engine import Engine
from trainers.failures import TrainingError
from trainers.methods import BaseMethod
from trainers.monitors import Monitor
from trainers.nonfinite import NonfiniteGuard
from trainers.runlog import RunLog
from trainers.state import (
    CheckpointConfig,
    CheckpointError,
    RunState,
    checkpoint_path,
    damage_named,
    find_checkpoint,
    generator_states,
    load_checkpoint,
    load_strict,
    remove_drafts,
    restore_generators,
)
from trainers.status import record_checkpoint
from trainers.stopping import EXIT_PREEMPTED, StopSignal
from trainers.weights import save_tensors


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
    recipe: str  # as YAML
    export: dict[str, Any]  # what a reader of the exported encoder must know: architecture, stem, size, statistics


def pretrain(run: Run) -> int:
    """Train to the end, from the newest whole checkpoint if there is one; returns the exit code of the process.

    0 when done; EXIT_PREEMPTED after SIGTERM, SIGINT or SIGUSR1, once a checkpoint is written.

    Raises:
        CheckpointError: the checkpoint there is does not fit.
        TrainingError: checkpoints can no longer be written.
    """
    ranks, log = run.engine.ranks, run.log
    steps_per_epoch = run.loader.steps_per_epoch
    total = run.epochs * steps_per_epoch
    stop = StopSignal.installed()
    step, evaluation_left = _resume(run)
    log.open(step)
    writer = CheckpointWriter(
        run.directory,
        run.checkpoint,
        ranks,
        permanent=_steps(run.checkpoint.keep_every_epochs, run),
        say=log.say,
        written=lambda of_step: _record(run, of_step),
    )
    guard = NonfiniteGuard(run.engine, run.method, run.loader, run.directory, log)
    due = _Intervals(run)
    run.method.train()
    log.restart_clock()
    stop.begin()
    try:
        if evaluation_left and not _evaluate(run, step, stop):
            return _stopped(run, stop, step)
        while step < total:
            epoch, first_step = divmod(step, steps_per_epoch)
            for micro_batches, waited in _timed(run.loader.epoch(epoch, first_step)):
                lr = run.schedule(step)
                log.add(guard.step(step + 1, micro_batches, lr, run.monitor.observe), waited)
                step += 1

                if step % log.config.every_steps == 0 or step == total:
                    log.write_step(step, step / steps_per_epoch, lr)
                if evaluation_left := due.evaluation(step):
                    guard.look()
                    evaluation_left = not _evaluate(run, step, stop)

                stopping, timed, pending = map(bool, ranks.highest(stop.requested, writer.due(), writer.pending))
                writer.advance(pending)
                last = stopping or step == total
                if last or timed or due.checkpoint(step):
                    guard.before_save(step)
                    state = run_state(run, step, evaluation_left)
                    if last:
                        writer.write_now(state)
                    else:
                        writer.write(state)
                    log.restart_clock()
                if last and (step < total or evaluation_left):
                    return _stopped(run, stop, step)
        if ranks.is_main:
            _export_encoder(run)
        ranks.barrier()
        return 0
    finally:
        with suppress(Exception):  # what ended the run is told
            writer.leave()
        run.loader.close()
        log.close()


class _Intervals:
    """What is due at which steps; the last step is always evaluated."""

    def __init__(self, run: Run) -> None:
        self._total = run.epochs * run.loader.steps_per_epoch
        self._evaluate = _steps(run.monitor.config.every_epochs, run)
        config = run.checkpoint
        of_epochs = (_steps(config.every_epochs, run), _steps(config.keep_every_epochs, run))
        self._save = [every for every in (*of_epochs, config.every_steps) if every]

    def evaluation(self, step: int) -> bool:
        return step == self._total or (self._evaluate is not None and step % self._evaluate == 0)

    def checkpoint(self, step: int) -> bool:
        return any(step % every == 0 for every in self._save)


def _steps(epochs: float | None, run: Run) -> int | None:
    return None if epochs is None else max(1, round(epochs * run.loader.steps_per_epoch))


def _evaluate(run: Run, step: int, stop: StopSignal) -> bool:
    """Write the held-out scores; False if a signal on any rank came before they were known."""
    run.engine.average_running_statistics()
    scores = run.monitor.evaluate(lambda: run.engine.ranks.any(stop.requested))
    if scores:
        run.log.write_scores(step, step / run.loader.steps_per_epoch, scores)
    run.log.restart_clock()
    return scores is not None


def _stopped(run: Run, stop: StopSignal, step: int) -> int:
    (seconds,) = run.engine.ranks.highest(stop.seconds())
    run.log.say(
        f"stopped by {stop.name} at step {step}, its checkpoint in place {seconds:.1f} s after the signal;"
        " the same command resumes"
    )
    return EXIT_PREEMPTED


def _record(run: Run, step: int) -> None:
    """In ``status.json``: the checkpoint of that step is whole and in its place."""
    if run.engine.ranks.is_main:
        name = checkpoint_path(run.directory, step).name
        record_checkpoint(run.directory, step, step // run.loader.steps_per_epoch, name)


def run_state(run: Run, step: int, evaluation_left: bool = False) -> RunState:
    """Everything that the run is; the tensors are the run's own, and change with it."""
    run.engine.average_running_statistics()
    shared = {"method": dict(run.method.state_dict()), "meters": run.log.state(), **run.monitor.state()}
    sharded = {"generators": generator_states(run.engine.ranks.device)}
    if (loader_state := run.loader.state()) is not None:
        sharded["loader"] = {"state": loader_state}
    (sharded if run.engine.config.zero_stage else shared)["optimizer"] = run.engine.optimizer_state()
    values = {
        "epoch": step // run.loader.steps_per_epoch,
        "step_in_epoch": step % run.loader.steps_per_epoch,
        "evaluation_left": evaluation_left,
        "images": len(run.loader.source),
        "accumulation": run.engine.config.accumulation,
        "data": data_fingerprint(run.loader.source) if run.engine.ranks.is_main else None,
        "encoder": run.export,
        "recipe": run.recipe,
    }
    return RunState(step, shared, sharded, values)


def _resume(run: Run) -> tuple[int, bool]:
    """Restore the newest whole checkpoint; returns the step to go on from, and whether it is still to be evaluated."""
    ranks = run.engine.ranks
    if ranks.is_main:
        remove_drafts(run.directory)
    data = ranks.from_main(data_fingerprint(run.loader.source) if ranks.is_main else None)
    path = ranks.from_main(find_checkpoint(run.directory) if ranks.is_main else None)
    if path is None:
        return 0, False
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there on rank {ranks.rank}; run.dir must be on storage that all ranks share"
        )
    state = load_checkpoint(path, ranks)
    with damage_named(path):
        _check_same_data(run, state, data, path)
        restore(run, state, str(path))
    run.log.say(f"resuming from {path} (step {state.step})")
    for remark in elastic_remarks(state.values, ranks.world_size, run.engine.config, run.log.batch_size):
        run.log.say(remark)
    left = state.values.get("evaluation_left", False)
    return state.step, ranks.from_main(left and ranks.is_main and not run.log.has_scores(state.step))


def _check_same_data(run: Run, state: RunState, data: Any, path: Path) -> None:
    images, name = len(run.loader.source), run.loader.source.name
    if state.values["images"] != images:
        raise CheckpointError(
            f"{path} was trained on {state.values['images']} images, {name} now has {images}: order and schedule would"
            " change in the middle; restore the images, or start anew with another run.dir"
        )
    if is_other_data(state.values.get("data"), data):
        raise CheckpointError(
            f"{path} was trained on other images than {name} now has, though as many: files have other names or sizes"
            " than then; restore them, or start anew with another run.dir"
        )


def restore(run: Run, state: RunState, path: str) -> None:
    """Put a checkpoint's state into the run, whatever the number of ranks that wrote it."""
    ranks = run.engine.ranks
    load_strict(run.method, state.shared["method"], f"{path}/method.safetensors")
    try:
        if "optimizer" in state.all_shards:
            run.engine.load_optimizer_shards(state.all_shards["optimizer"])
        else:
            optimizer = state.sharded if run.engine.config.zero_stage else state.shared
            run.engine.load_optimizer_state(optimizer["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    run.log.load(state.shared["meters"])
    run.monitor.load(state.shared)
    if "generators" in state.sharded:
        restore_generators(state.sharded["generators"], ranks.device)
    else:  # of another number of ranks: other draws, but not those of the run's first steps again
        torch.manual_seed((torch.initial_seed() + 1_000_003 * state.step) % 2**63)
    if "loader" in state.sharded:
        try:
            run.loader.load_state(state.sharded["loader"]["state"])
        except DataError as error:
            raise CheckpointError(f"{path}: {error}") from error


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
    draft = run.directory / ".encoder.safetensors.tmp"
    try:
        save_tensors(draft, run.method.encoder.state_dict(), {"twinstream": json.dumps(run.export)})
        draft.replace(run.directory / "encoder.safetensors")
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{run.directory / 'encoder.safetensors'} could not be written ({error}); training is done and in the last"
            " checkpoint, the same command writes the encoder"
        ) from error
