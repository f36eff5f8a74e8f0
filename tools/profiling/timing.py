"""Seconds of calls, taken in turns, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainers.engine import Ranks

LEAST_ROUNDS, MOST_ROUNDS = 3, 100


class Clock:
    """Times calls to their end on the device; all ranks make the same number of calls."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rounds(self, spent: float, seconds: float) -> int:
        """How often to repeat what took ``spent`` seconds, to fill ``seconds``: rank 0's answer on all ranks."""
        wanted = round(seconds / max(spent, 1e-9))
        return int(self.ranks.from_main(min(MOST_ROUNDS, max(LEAST_ROUNDS, wanted))))

    def fastest(self, call: Callable[[], Any], seconds: float) -> float:
        """The shortest of the calls that fit into ``seconds``, at least three: a limit is what can be reached."""
        self(call)
        return min(self(call) for _ in range(self.rounds(self(call), seconds)))

    def in_turns(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Median seconds of each; rounds over all of them for about ``seconds`` a call, each warmed by two."""
        for call in calls.values():
            call()
        warm = sum(self(call) for call in calls.values())
        rounds = self.rounds(warm, seconds * len(calls))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self(call))
        return {name: statistics.median(spent) for name, spent in times.items()}
