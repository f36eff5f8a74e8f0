"""What the device itself can do, measured where the run runs: the floors of all stages are computed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tools.profiling.timing import Clock

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far more than any cache
_SIDE = {"cuda": 8192, "cpu": 1536}


@dataclass(frozen=True, slots=True)
class Limits:
    copy: float  # bytes/s, read and written, of a large copy on the device
    matmul: float  # FLOP/s of a large square matrix product in the run's precision
    precision: str


def measure_limits(clock: Clock, dtype: torch.dtype, seconds: float) -> Limits:
    """The rates of a large copy and of a large matrix product on ``clock.device``; about ``seconds`` for each."""
    kind = clock.device.type
    moved, side = 2 * _COPY_BYTES[kind], _SIDE[kind]
    copy = clock.fastest(_copy(_COPY_BYTES[kind], clock.device), seconds)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    product = clock.fastest(lambda: torch.mm(a, b), seconds)
    return Limits(moved / copy, 2 * side**3 / product, str(dtype).removeprefix("torch."))


def _copy(count: int, device: torch.device) -> Callable[[], torch.Tensor]:
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
