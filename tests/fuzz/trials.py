"""What the fuzz tests share: trials that are the same on every run, a watchdog, a bound on memory, mutations.

A test runs few trials, and under ``-m slow`` many. TWINSTREAM_FUZZ multiplies both, TWINSTREAM_FUZZ_SEED is the first.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

FACTOR = float(os.environ.get("TWINSTREAM_FUZZ", "1"))
FIRST = int(os.environ.get("TWINSTREAM_FUZZ_SEED", "0"))
PATIENCE = 60  # seconds that one trial may take on a busy machine; what takes longer hangs


def trials(quick: int, many: int) -> Any:
    """Parametrises ``count``: few trials always, many under ``slow``."""
    counts = [max(1, int(quick * FACTOR)), max(1, int(many * FACTOR))]
    return pytest.mark.parametrize(
        "count",
        [pytest.param(counts[0], id="quick"), pytest.param(counts[1], id="many", marks=pytest.mark.slow)],
    )


def try_all(check: Callable[[Any], None], strategy: SearchStrategy[Any], count: int) -> None:
    """``check`` on ``count`` examples of a hypothesis strategy, the same on every run."""

    def property_holds(example: Any) -> None:
        with within(PATIENCE):
            check(example)

    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    bounded = settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet)
    bounded(seed(FIRST)(given(strategy)(property_holds)))()


def try_mutations(check: Callable[[bytes], object], seeds: Sequence[bytes], count: int, most: int = 1 << 20) -> int:
    """``check`` on ``count`` mutated files; returns how many it accepted. A failure names its trial."""
    accepted = 0
    for trial in range(FIRST, FIRST + count):
        data = mutated(seeds, random.Random(trial), most)
        try:
            with within(PATIENCE):
                accepted += check(data) is not None
        except BaseException as error:
            error.add_note(f"trial {trial} (TWINSTREAM_FUZZ_SEED={trial} TWINSTREAM_FUZZ=0 runs it alone)")
            raise
    return accepted


_ODD = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)


def mutated(seeds: Sequence[bytes], draw: random.Random, most: int) -> bytes:
    """One of the files with one to six things changed: bits, bytes, numbers, lengths; parts of others."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 6)):
        if not data:
            break
        at = draw.randrange(len(data)) if draw.random() < 0.7 else draw.randrange(min(len(data), 400))
        many = draw.randint(1, min(64, len(data) - at))
        kind = draw.randrange(9)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at : at + many] = bytes([draw.choice(_ODD)]) * many
        elif kind == 3:
            if draw.random() < 0.3:
                del data[at:]
        elif kind == 4:
            del data[at : at + many]
        elif kind == 5:
            data[at:at] = draw.randbytes(many)
        elif kind == 6:  # a number of 2 to 8 bytes
            size, order = draw.choice((2, 4, 8)), draw.choice(("little", "big"))
            value = draw.choice((0, 1, 2**31, 2**31 - 1, 2**63, 2**64 - 1, len(data), draw.getrandbits(64)))
            data[at : at + size] = (value % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
        elif kind == 7:  # the same again
            data[at:at] = data[at : at + many] * draw.randint(1, 4)
        else:
            other = draw.choice(seeds)
            start = draw.randrange(len(other)) if other else 0
            data[at : at + many] = other[start : start + draw.randint(1, 512)]
    return bytes(data[:most])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds: a hang fails its test."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def with_memory(megabytes: int, action: Callable[[], object], seconds: float = 120) -> str:
    """What ``action`` gives as text, or "Type: message" of what it raises, in a process that may take so much more.

    A process that dies, or is not done in time, fails the test.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # nothing of the test may run on here
        try:
            signal.alarm(int(seconds))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                said = str(action())
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, said.encode(errors="replace")[:60_000])
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the process ended with status {status}: a hang, a crash or more memory than allowed"
    return said
