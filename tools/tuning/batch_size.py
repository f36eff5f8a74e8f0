"""The largest batch that fits: real steps of the real recipe, each batch tried in a process of its own.

Only the end of a process gives back all that its steps took: caches, workspaces and fragments, on a GPU as on a CPU.
And an allocation on a CPU does not fail: a process that passes its budget has to be stopped from outside.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.recipe import Recipe, RecipeError, check_combinations, load_recipe
from pipelines.batch import ViewBatch
from pipelines.loading import Loader
from pipelines.resident import free_bytes
from pipelines.sources import DataError
from train import build_run
from trainers.engine import Ranks, joined_ranks
from trainers.heap import keep_freed_memory
from trainers.memory import is_out_of_memory
from trainers.step import train_step

STEPS = 3  # of a try: the second has the optimizer's state, the third the loader's batches ahead
_INTERVAL = 0.02  # seconds between two looks at a process's memory
_WORKERS_EVERY = 25  # looks: theirs takes milliseconds to add up


class TuneError(RuntimeError):
    """Nothing could be found; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Try:
    batch_size: int  # of all ranks together
    outcome: str  # "fits", or why it does not
    peak: int | None = None  # bytes of one process: of GPU memory, or on a CPU resident
    rate: float | None = None  # images/s of one process, loading left out

    @property
    def fits(self) -> bool:
        return self.outcome == "fits"


def largest_batch(fits: Callable[[int], bool], *, start: int, unit: int, limit: int) -> int:
    """The largest multiple of ``unit`` up to ``limit`` that fits, by doubling (or halving) and bisection; 0: none.

    ``start`` is rounded down to a multiple and tried first. If one batch does not fit, larger ones are not tried.
    """
    most = limit // unit
    if most < 1:
        return 0
    low, high = 0, most + 1  # the largest that is known to fit, the smallest that is known not to
    batch = min(max(1, start // unit), most)
    while True:
        if fits(batch * unit):
            low = batch
        else:
            high = batch
        if high - low == 1:
            return low * unit
        batch = min(2 * low, most) if high > most else (low + high) // 2


class Tries:
    """Tries batches of a recipe, and remembers them.

    Args:
        path, overrides: of the recipe, as ``load_recipe`` takes them.
        ranks: processes that the run will have; a try is the share of one of them.
        memory: bytes that one of them may take; None: what is free, on the GPU or of the machine's memory.
        margin: share of the memory that is left free.
        work: what a try does, in a process of its own; called as ``make_steps`` is.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        *,
        ranks: int = 1,
        memory: int | None = None,
        margin: float = 0.1,
        work: Callable[[Connection, Path, list[str], int, int], None] | None = None,
    ) -> None:
        self.path, self.overrides, self.ranks, self.margin = path, list(overrides), ranks, margin
        self.memory, self._work = memory, work or make_steps
        self.device = ""  # known after the first try
        self.tried: list[Try] = []
        self._free = free_bytes(torch.device("cpu"))

    @property
    def budget(self) -> int | None:
        """Bytes that a try may take; None: not known yet."""
        return None if self.memory is None else int(self.memory * (1 - self.margin))

    def fits(self, batch_size: int) -> bool:
        """Whether ``STEPS`` steps with this batch stay within the budget.

        Raises:
            TuneError: the try ended for a reason that is not memory.
        """
        try:
            load_for(self.path, self.overrides, batch_size, self.ranks)
        except RecipeError as error:
            result = Try(batch_size, f"refused: {error}")
        else:
            result = self._tried(batch_size)
        self.tried.append(result)
        return result.fits

    def _tried(self, batch_size: int) -> Try:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=self._work, args=(theirs, self.path, self.overrides, batch_size, self.ranks))
        process.start()
        theirs.close()
        try:
            return self._watched(process, ours, batch_size)
        finally:
            process.kill()
            process.join()
            ours.close()

    def _watched(self, process: Any, pipe: Connection, batch_size: int) -> Try:
        watched, looks, own, workers = False, 0, 0, 0
        while True:
            if pipe.poll(_INTERVAL):
                try:
                    said = pipe.recv()
                except EOFError:
                    return _died(process, batch_size)
                if "device" in said:
                    watched = said["device"] == "CPU"
                    self.device = said["device"]
                    if self.memory is None:
                        self.memory = self._free if watched else said["free"]
                elif "refused" in said:
                    return Try(batch_size, f"refused: {said['refused']}")
                elif "peak" not in said:
                    return Try(batch_size, "out of memory")
                else:
                    peak = said["peak"] + workers
                    return Try(batch_size, "fits" if peak <= _known(self.budget) else "too large", peak, said["rate"])
            if watched:
                own = max(own, _resident(process.pid))
                if looks % _WORKERS_EVERY == 0:
                    workers = max(workers, _resident_of_workers(process.pid))
                looks += 1
                if own + workers > _known(self.budget):
                    return Try(batch_size, "stopped on passing the budget", own + workers)


def load_for(path: Path, overrides: Sequence[str], batch_size: int, ranks: int) -> Recipe:
    """The recipe with this batch, checked for a run of ``ranks`` processes.

    Raises:
        RecipeError: the recipe cannot be run with it.
    """
    recipe = load_recipe(path, [*overrides, f"batch_size={batch_size}"])
    check_combinations(recipe, world_size=ranks)
    return recipe


def endless(loader: Loader) -> Generator[list[ViewBatch], None, None]:
    """The steps of one epoch after the other."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


# ---- in the process of a try ----------------------------------------------------------------------------


def make_steps(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    """Sends ``device`` and ``free`` (bytes), then ``peak`` (bytes) and ``rate``, ``refused``, or nothing: no memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    with contextlib.suppress(OSError):  # if the machine runs out of memory, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            recipe = load_for(path, overrides, batch_size, ranks)
            share = recipe.model_copy(update={"batch_size": batch_size // ranks})
            with joined_ranks(share.engine) as alone:
                gpu = alone.device.type == "cuda"
                name = torch.cuda.get_device_name(alone.device) if gpu else "CPU"
                free = free_bytes(alone.device)
                keep_freed_memory(share.engine, alone.device)
                pipe.send({"device": name, "free": free})
                pipe.send(_measured(share, path, alone, free))
    except (RecipeError, DataError) as error:
        pipe.send({"refused": str(error)})
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        pipe.send({})


def _measured(recipe: Recipe, path: Path, ranks: Ranks, free: int) -> dict[str, float]:
    """The loop of ``trainers.pretrain`` without all that happens at an interval."""
    device, seconds = ranks.device, []
    run = build_run(recipe, path, ranks)
    run.method.train()
    with contextlib.closing(endless(run.loader)) as batches:
        for step, micro_batches in zip(range(STEPS), batches, strict=False):
            start = time.perf_counter()
            result = train_step(run.engine, run.method, micro_batches, run.schedule(step))
            run.monitor.observe(result)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        if device.type == "cuda":  # what PyTorch does not allocate: a loader's decoders, libraries
            others = free - free_bytes(device) - torch.cuda.memory_reserved(device)
            peak = torch.cuda.max_memory_allocated(device) + max(0, others)
        else:
            peak = _largest_resident()
    run.loader.close()
    return {"peak": peak, "rate": recipe.batch_size * (STEPS - 1) / sum(seconds[1:])}


def _largest_resident() -> int:
    """The most bytes that this process has had in memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Not on Linux: there, this would begin with what the parent had in memory.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- beside it ------------------------------------------------------------------------------------------


def _resident(pid: int) -> int:
    """Bytes that a process has in memory now; 0 where it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _resident_of_workers(pid: int) -> int:
    """The same of all processes that it started, pages that several share counted once."""
    held = 0
    with contextlib.suppress(psutil.Error):
        for worker in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                full = worker.memory_full_info()
                held += getattr(full, "pss", full.uss)
    return held


def _died(process: Any, batch_size: int) -> Try:
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return Try(batch_size, "killed by the system, as it does where memory runs out")
    raise TuneError(
        f"the try of batch_size={batch_size} ended with exit code {process.exitcode}, for a reason that is not memory"
        " and that it told above; see whether train.py runs the recipe"
    )


def _known(budget: int | None) -> int:
    assert budget is not None
    return budget
