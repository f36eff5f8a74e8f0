"""How the benchmarks time and weigh: contenders take turns in one process; memory is measured in fresh ones."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operation at one size. The first contender is ours; the others are measured against it.

    Args:
        name: unique, such as "ntxent 2N=512".
        contenders: contenders(small) makes them, by name, of this size or of a tiny one; without those that are
            not installed.
        error: how far what a contender returns is from float64, if that is worth a column.
        targets: least times that each named rival's time may be of ours, on `threads` or else on one.
        memory: contenders whose peak memory is worth a process.
        threads: how many are prescribed; None: any.
    """

    name: str
    contenders: Callable[[bool], Mapping[str, Run]]
    repeats: int = 10
    error: Callable[[Any], float] | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    memory: Sequence[str] = ()
    threads: int | None = None


def take_turns(contenders: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, after one that is not counted. All see the same machine, whatever else it does.

    Who has used up 15 seconds stops after three rounds.
    """
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, run in contenders.items():
            if turn >= 3 and sum(times[name]) > 15_000:
                continue
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def measure(case: Case) -> list[dict[str, Any]]:
    contenders = case.contenders(False)
    errors = {} if case.error is None else {name: case.error(run()) for name, run in contenders.items()}
    times = take_turns(contenders, case.repeats)
    ours = next(iter(contenders))
    return [
        {
            "case": case.name,
            "contender": name,
            "ms": statistics.median(spent),
            "fastest_ms": min(spent),
            # Of each round, since neighbours on the machine slow both down.
            "ratio": statistics.median(theirs / mine for theirs, mine in zip(spent, times[ours], strict=False)),
            "target": case.targets.get(name),
            "error": errors.get(name),
        }
        for name, spent in times.items()
    ]


def peak_above_warm(case: Case, name: str) -> float:
    """Megabytes that one call adds at its peak to this process, which has run a tiny one and holds the inputs."""
    case.contenders(True)[name]()
    run = case.contenders(False)[name]
    before = reset_peak()
    run()
    return (peak_memory() - before) / 1e6


def median_of_fresh_processes(command: Sequence[str], processes: int = 3) -> float:
    """The median of the numbers that as many processes print last."""
    found = []
    for _ in range(processes):
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        found.append(float(run.stdout.split()[-1]))
    return statistics.median(found)


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def reset_peak() -> int:
    """Forget the process's peak memory, where the system lets one; the memory it has now, or the old peak."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return peak_memory()


def peak_memory() -> int:
    try:
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
