"""The part of `benchmarks/gpu.py` that times `train.py`'s own loop body beside a bare step."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks.gpu_record import Record
from benchmarks.gpu_step import BareStep, Shape, build_method_and_optimizer, in_turns, memory
from benchmarks.gpu_training import RESNET18, RESNET50, SECONDS, SMOKE
from pipelines.batch import ViewBatch

ENDLESS = 1 << 40  # steps


def run_engine(record: Record, device: torch.device, smoke: bool) -> None:
    """One row for each encoder, under ``engine``."""
    for shape in (SMOKE,) if smoke else (RESNET18, RESNET50):
        about = {"case": shape.name, "variant": "train.py's step: engine, guard, probe, log"}
        if not record.wanted(f"{shape.name}, {about['variant']}"):
            continue
        row = about | record.attempt(lambda shape=shape: engine_row(shape, device, 0 if smoke else SECONDS))  # type: ignore[misc]
        record.add("engine", row)
        print(describe(row))


def engine_row(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Both on the same crops, in turns: what the engine and all around it cost."""
    bare = BareStep(shape, device)
    with engine_step(shape, bare) as step:
        step()
        with memory(device) as used:
            step()
        spent = in_turns({"engine": step, "bare": bare}, device, seconds)
    return {
        "images": shape.images,
        "ms": spent["engine"],
        "bare_ms": spent["bare"],
        "over_bare": spent["engine"] / spent["bare"] - 1,
        "images_per_second": 1000 * shape.images / spent["engine"],
        **used,
    }


@contextmanager
def engine_step(shape: Shape, bare: BareStep) -> Iterator[Callable[[], None]]:
    """One step as `trainers.pretrain` makes it, on views that ``bare`` makes: DeepSpeed's engine, the guard against
    values that are not finite, the online probe, the log at its interval, and the word between ranks."""
    import deepspeed  # noqa: F401  (the row names it if it is not there)

    from trainers.encoders import feature_width
    from trainers.engine import Engine, EngineConfig, joined_ranks
    from trainers.monitors import Monitor, MonitorConfig, Probe
    from trainers.nonfinite import NonfiniteGuard
    from trainers.runlog import LogConfig, RunLog

    config = EngineConfig(precision="bfloat16")
    loader = cast(Any, SimpleNamespace(steps_per_epoch=ENDLESS))
    with tempfile.TemporaryDirectory() as folder, joined_ranks(config) as ranks, _silence():
        method, optimizer = build_method_and_optimizer(shape, bare.device)
        engine = Engine(method, optimizer, config, ranks, shape.images)
        log = RunLog(LogConfig(), Path(folder), ranks, total_steps=ENDLESS, batch_size=shape.images, recipe={})
        monitor = Monitor(
            MonitorConfig(), method.encoder, None, None, size=shape.size, batch_size=shape.images, ranks=ranks
        )
        monitor.probe = Probe(feature_width(method.encoder), 10, 1e-3, bare.device)
        guard = NonfiniteGuard(engine, method, loader, Path(folder), log)
        log.open(0)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            batch = ViewBatch(bare.views(), bare.batch.labels, bare.batch.indices)
            log.add(guard.step(done, [batch], 0.0, monitor.observe), 0.0)
            if done % log.config.every_steps == 0:
                log.write_step(done, 0.0, 0.0)
            ranks.highest(False, False, False)

        try:
            yield step
        finally:
            log.close()


@contextmanager
def _silence() -> Iterator[None]:
    """The log's lines are written, and not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def describe(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['case']}, {row['variant']}: {row['missing']}"
    return (
        f"{row['case']}, {row['variant']}: {row['ms']:.2f} ms, {row['images_per_second']:,.0f} images/s,"
        f" {row['over_bare']:+.1%} over the bare step's {row['bare_ms']:.2f} ms"
    )
