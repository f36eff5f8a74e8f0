"""Time and memory of one operation at one size, each in a process of its own that has just been forked.

Forked, since importing PyTorch takes seconds and there are hundreds of points; so the process that forks keeps to one
thread. Time is CPU time. Memory is the peak of the resident set above what inputs and code hold, with an allocator that
gives every freed block from 1 MiB on back to the system, so that no earlier peak can hide a later one.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from benchmarks.growth_fit import Expected, Growth
from benchmarks.harness import Run, peak_memory, reset_peak

T = TypeVar("T")
_LONG = 1.5  # seconds: an operation that takes as long is run once
_ENOUGH = 0.2  # seconds to be spent on repetitions of a shorter one
_MOST_REPEATS = 50
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@dataclass(frozen=True)
class Case:
    """One operation whose work is given a size.

    Args:
        sizes: ascending.
        make: makes the operation of a size, and clears away what it needs. The smallest is run once before anything
            is forked, so that nothing is compiled or imported while it is measured.
        expected: by unit, "CPU s" and "bytes".
        per: what a size's cost is divided by; None: nothing.
        settled: whether it is run once at its own size before its memory is measured: what it fills for good at its
            first run is left out.
    """

    group: str
    name: str
    along: str
    sizes: tuple[int, ...]
    make: Callable[[int], AbstractContextManager[Run]]
    expected: Mapping[str, Expected]
    per: Callable[[int], float] | None = None
    settled: bool = False

    def grown(self) -> list[Growth]:
        with self.make(self.sizes[0]) as run:
            run()
        points = [self._point(size) for size in self.sizes]
        return [
            Growth(
                self.group, self.name, self.along, unit, self.sizes, tuple(point[unit] for point in points), expected
            )
            for unit, expected in self.expected.items()
        ]

    def _point(self, size: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if "bytes" in self.expected:
            found = in_child(lambda: memory_of(self, size))
        if "CPU s" in self.expected and found.get("CPU s", 0) < _LONG:
            found["CPU s"] = in_child(lambda: time_of(self.make, size))
        divisor = 1.0 if self.per is None else self.per(size)
        return {unit: value / divisor for unit, value in found.items()}


class ProbeError(RuntimeError):
    """A process that measured has failed; it has said why."""


def in_child(work: Callable[[], T], *, fresh: bool = False) -> T:
    """What `work` returns in a forked process, or in one that begins anew (`work` is to be pickled then).

    Raises:
        ProbeError: it raised, or the process was killed.
    """
    context: Any = multiprocessing.get_context("spawn" if fresh else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, sender))
    process.start()
    sender.close()
    try:
        answer: T = receiver.recv()
    except EOFError:
        process.join()
        ended = f"killed by signal {-process.exitcode}" if (process.exitcode or 0) < 0 else "failed, as it says above"
        raise ProbeError(f"the process that measured was {ended}") from None
    process.join()
    return answer


def _answer(work: Callable[[], Any], sender: Connection) -> None:
    torch.set_num_threads(1)  # or else several threads at once would make anew what PyTorch drops when it is forked
    sender.send(work())


def memory_of(case: Case, size: int) -> dict[str, float]:
    """Bytes that one run adds at its peak, and its CPU seconds."""
    with case.make(case.sizes[0]) as run:  # a forked process maps code anew, and that is memory too
        run()
    _map_large_blocks()
    with case.make(size) as run:
        if case.settled:
            run()
        gc.collect()
        _give_back()  # or else what making the inputs has left would be filled first, and not be seen
        before, start = reset_peak(), time.process_time()
        kept = run()
        spent, after = time.process_time() - start, peak_memory()
        del kept
    return {"bytes": max(after - before, 0), "CPU s": spent}


def time_of(make: Callable[[int], AbstractContextManager[Run]], size: int) -> float:
    """CPU seconds of a run: the fastest of several, after one that is not counted."""
    with make(size) as run:
        run()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < _ENOUGH and len(times) < _MOST_REPEATS):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return min(times)


def _map_large_blocks() -> None:
    """Map blocks from 1 MiB on one by one, and give them back once freed; other allocators stay as they are."""
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)  # a tile is less, which would be mapped anew thousands of times
        library.mallopt(_TRIM_THRESHOLD, 1 << 23)


def _give_back() -> None:
    """Return to the system what is free."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
