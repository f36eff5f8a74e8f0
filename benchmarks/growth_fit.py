"""How a cost grows: the exponent of the power law through measured points, and whether more was measured than expected.

A cost is c + a·x^b. Its exponent is read where c matters least, over the upper half of the range of sizes (of their
logarithms: from 4,096 on, of 256 to 65,536).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAST_POINTS = 3
# How far a fitted exponent may lie above the expected one. Times see the caches end on their way up, and what grows
# sees it at every element; counted bytes do not.
MARGINS = {"CPU s": (0.2, 0.3), "bytes": (0.1, 0.1), "FLOP": (0.02, 0.02)}  # of what is flat, of what is not
# Less cannot be told from nothing, and counts as so much: a page here and there, a millisecond of the kernel's.
FLOORS = {"CPU s": 1e-9, "bytes": float(1 << 20), "FLOP": 1.0}


@dataclass(frozen=True, slots=True)
class Expected:
    exponent: float
    why: str  # a sentence
    floor: float | None = None  # instead of that of `FLOORS`, for numbers that are counted rather than measured


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity of one operation, along the size of its work."""

    group: str
    name: str
    along: str  # what the sizes count
    unit: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    expected: Expected

    @property
    def floor(self) -> float:
        return FLOORS[self.unit] if self.expected.floor is None else self.expected.floor

    @property
    def fitted_from(self) -> int:
        """The first size of the fit."""
        return fit_from(self.sizes)

    @property
    def fitted(self) -> float:
        points = [point for point in zip(self.sizes, self.values, strict=True) if point[0] >= self.fitted_from]
        sizes, values = zip(*points, strict=True)
        return exponent(sizes, [max(value, self.floor) for value in values])

    @property
    def verdict(self) -> str:
        difference, margin = self.fitted - self.expected.exponent, MARGINS[self.unit][self.expected.exponent > 0]
        return "MORE" if difference > margin else "less" if difference < -margin else "as expected"

    def to_json(self) -> dict[str, Any]:
        found = {"fitted": self.fitted, "fitted_from": self.fitted_from, "verdict": self.verdict}
        return asdict(self) | {"expected": self.expected.exponent, "why": self.expected.why} | found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of a·x^b, by least squares of log(value) against log(size).

    Raises:
        ValueError: fewer than two different sizes, or a size or value that is not positive.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs at least two different sizes, and a value of each; got {list(sizes)}")
    if min(*sizes, *values) <= 0:
        raise ValueError("an exponent needs positive sizes and values")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def fit_from(sizes: Sequence[int]) -> int:
    """The size that a fit begins at: the first of the upper half, which has three points at least."""
    ordered = sorted(sizes)
    middle = ordered[0] * ordered[-1]
    upper = [size for size in ordered if size * size >= middle]
    return min(upper[0], ordered[-min(LEAST_POINTS, len(ordered))])
