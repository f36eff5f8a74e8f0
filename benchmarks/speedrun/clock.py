"""A clock that runs in training only, and when a curve reached what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent inside `running()`; the device has finished its work whenever the time is read."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, device: torch.device | None = None) -> None:
        self.seconds = 0.0
        self._now, self._device = now, device

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self._read()
        try:
            yield
        finally:
            self.seconds += self._read() - start

    def _read(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._now()


def reached(curve: Sequence[dict[str, float]], score: str, target: float) -> dict[str, float] | None:
    """The first check on a curve whose score is at least the target; None if there is none."""
    return next((check for check in curve if check.get(score, -1.0) >= target), None)
