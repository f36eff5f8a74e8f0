"""The parts of the simplex loss in tiles of PyTorch. See `kernels.simplex` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Two float32 tiles take 512 KB: they stay in the second-level cache of one core.
TILE_ROWS = 256
TILE_COLUMNS = 256
_LOWEST_EXACT = -12.0  # below, exp(x) is so small that three terms of a series give log(softplus) to the last digit


class Settings(NamedTuple):
    temperature: float
    floor: float
    classes: int  # C
    total: int  # N of all ranks
    fast: bool  # whether the Triton kernels may multiply in TF32

    def powers_fit(self, dtype: torch.dtype) -> bool:
        """Whether r^(1/T), and sums and quotients of it, stay within the range of a dtype without their maximum."""
        widest = max(abs(math.log(self.floor)), math.log(max(self.total, 2)))
        return widest / self.temperature + math.log(self.total) <= 0.47 * math.log(torch.finfo(dtype).max)


def log_softplus(z: Tensor, beta: float) -> Tensor:
    """log(log(1 + e^x)) of x = beta z, in float32 at least; differentiable, finite for every finite z."""
    x, low, t, high = _low_and_high(z, beta)
    return torch.where(low, x - t / 2 + 5 / 24 * t * t, torch.logaddexp(high, torch.zeros_like(high)).log())


def posteriors(z1: Tensor, z2: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """π of both views [N, C] and the inner products of partners [N]."""
    posterior1, posterior2 = (F.softmax(log_softplus(z, beta), dim=1) for z in (z1, z2))
    return posterior1, posterior2, (posterior1 * posterior2).sum(1)


def log_sums(rows: Tensor, columns: Tensor, start: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """The log of the sum of r^(1/T) of each row and of each column; without the diagonal that begins at `start`."""
    buffer = rows.new_empty(TILE_ROWS * TILE_COLUMNS)
    if settings.powers_fit(rows.dtype):
        of_rows, of_columns = rows.new_zeros(len(rows)), rows.new_zeros(len(columns))
        for down, across, diagonal in _tiles(len(rows), len(columns), start):
            powers = _ratios(buffer, rows[down], columns[across], settings.total).clamp_min_(settings.floor)
            _power_(powers, 1 / settings.temperature)
            _fill_diagonal(powers, diagonal, 0)
            of_rows[down].add_(powers.sum(1))
            of_columns[across].add_(powers.sum(0))
        return of_rows.log_(), of_columns.log_()
    of_rows, of_columns = rows.new_full((len(rows),), -math.inf), rows.new_full((len(columns),), -math.inf)
    for down, across, diagonal in _tiles(len(rows), len(columns), start):
        logits = _ratios(buffer, rows[down], columns[across], settings.total).clamp_min_(settings.floor)
        logits.log_().div_(settings.temperature)
        _fill_diagonal(logits, diagonal, -math.inf)
        of_rows[down] = torch.logaddexp(of_rows[down], logits.logsumexp(1))
        of_columns[across] = torch.logaddexp(of_columns[across], logits.logsumexp(0))
    return of_rows, of_columns


def pull(
    rows: Tensor, columns: Tensor, log_rows: Tensor, log_columns: Tensor, start: int, settings: Settings
) -> Tensor:
    """Per row i: the sum over the columns j but its partner of T dL/dlogit_ij / r_ij (π_j - 1/C), times 2N: [n, C]."""
    total, _ = _pull(rows, columns, log_rows, log_columns, start, settings, mirrored=False)
    return total


def pull_both(
    rows: Tensor, columns: Tensor, log_rows: Tensor, log_columns: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """`pull` of the rows and of the columns, from the same tiles."""
    return _pull(rows, columns, log_rows, log_columns, 0, settings, mirrored=True)


def _pull(
    rows: Tensor,
    columns: Tensor,
    log_rows: Tensor,
    log_columns: Tensor,
    start: int,
    settings: Settings,
    mirrored: bool,
) -> tuple[Tensor, Tensor]:
    buffer, spare_buffer = rows.new_empty(2, TILE_ROWS * TILE_COLUMNS)
    fit, power = settings.powers_fit(rows.dtype), 1 / settings.temperature - 1
    # A product with denormal numbers is 200 times slower, and nothing this far down reaches the result.
    lowest = 0.9 * math.log(torch.finfo(rows.dtype).tiny)
    of_rows, of_columns = (log_rows.neg().exp_(), log_columns.neg().exp_()) if fit else (log_rows, log_columns)
    total = torch.zeros_like(rows)
    mirrored_total = torch.zeros_like(columns) if mirrored else total
    centred = columns - 1 / settings.classes
    centred_rows = rows - 1 / settings.classes if mirrored else rows
    for down, across, diagonal in _tiles(len(rows), len(columns), start):
        w = _ratios(buffer, rows[down], columns[across], settings.total)
        floored = w < settings.floor
        w.clamp_min_(settings.floor)
        spare = spare_buffer[: w.numel()].view_as(w)
        of_row, of_column = of_rows[down, None], of_columns[None, across]
        if fit:
            _power_(w, power).mul_(torch.add(of_row, of_column, out=spare))
        else:
            w.log_().mul_(power)
            torch.sub(w, of_row, out=spare).clamp_(min=lowest).exp_()
            w.sub_(of_column).clamp_(min=lowest).exp_().add_(spare)
        w.masked_fill_(floored, 0)
        _fill_diagonal(w, diagonal, 0)
        total[down].addmm_(w, centred[across])
        if mirrored:
            mirrored_total[across].addmm_(w.T, centred_rows[down])
    return total, mirrored_total


def through_posterior(
    z: Tensor, posterior: Tensor, pulled: Tensor, partner: Tensor, repulsion: Tensor, factor: Tensor, beta: float
) -> Tensor:
    """The gradient to z [N, C], in its dtype, of `pulled` (which is overwritten) and of the positives."""
    gradient = pulled.addcmul_(repulsion[:, None], partner - 1 / z.shape[1], value=-1)
    gradient.sub_((gradient * posterior).sum(1, keepdim=True)).mul_(posterior)
    return gradient.mul_(_slope(z, beta)).mul_(factor * beta).to(z.dtype)


def _slope(z: Tensor, beta: float) -> Tensor:
    """The derivative of log(softplus(x)): sigmoid(x) / softplus(x), which is 0/0 far below zero and should be 1."""
    _, low, t, high = _low_and_high(z, beta)
    slope = high.sigmoid() / torch.logaddexp(high, torch.zeros_like(high))
    return torch.where(low, 1 - t / 2 + 5 / 12 * t * t, slope)


def _low_and_high(z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = beta z, where it is low, e^x there, and x elsewhere (harmless numbers where neither is wanted)."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    largest = torch.finfo(dtype).max
    x = beta * z.to(dtype)
    # Not clamp alone, whose derivative makes a 0 of NaN's.
    x = torch.where(x.isinf(), x.clamp(-largest, largest), x)
    low = x < _LOWEST_EXACT
    return x, low, torch.where(low, x, _LOWEST_EXACT).exp(), torch.where(low, _LOWEST_EXACT, x)


def _tiles(rows: int, columns: int, start: int) -> Iterator[tuple[slice, slice, int]]:
    """Tiles that cover [rows, columns], each with the diagonal of it that holds positives, if it reaches so far."""
    for top in range(0, rows, TILE_ROWS):
        for left in range(0, columns, TILE_COLUMNS):
            down = slice(top, min(top + TILE_ROWS, rows))
            yield down, slice(left, min(left + TILE_COLUMNS, columns)), start + top - left


def _ratios(buffer: Tensor, rows: Tensor, columns: Tensor, total: int) -> Tensor:
    """One tile of N <π1, π2>, written into `buffer`."""
    out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
    return torch.addmm(out, rows, columns.T, beta=0, alpha=total, out=out)


def _power_(values: Tensor, exponent: float) -> Tensor:
    """values^exponent in place."""
    if exponent in (0, 1, 2, -1):  # temperatures 1 and 1/2
        return values if exponent == 1 else values.pow_(exponent)
    return values.log_().mul_(exponent).exp_()


def _fill_diagonal(values: Tensor, diagonal: int, value: float) -> None:
    if -values.shape[0] < diagonal < values.shape[1]:
        values.diagonal(diagonal).fill_(value)
