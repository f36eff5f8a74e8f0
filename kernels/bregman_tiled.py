"""The parts of the Bregman loss in PyTorch. See `kernels.bregman` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Few enough numbers at a time to stay in the second-level cache of one core.
TILE_ELEMENTS = 1 << 16
TILE_ROWS = 256
TILE_COLUMNS = 256


def winners(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's highest score [2N], the lowest of equals, and how often each has won [K], int64."""
    winner = scores.argmax(1)
    counts = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    return winner, counts.scatter_add_(0, winner, torch.ones_like(winner))


def hard_losses(scores: Tensor, winner: Tensor, counts: Tensor, sigma: float, temperature: float) -> Tensor:
    """[2N] losses of scores [2N, K] against all views, of whose winners there are `counts`."""
    losses = []
    for _, own, partner, _, logits in _row_blocks(scores, winner, sigma, temperature):
        positive = logits.gather(1, partner)
        negative = _add_log_counts_(logits, own, partner, counts).logsumexp(1, keepdim=True)
        margin = negative - positive
        losses.append(torch.logaddexp(margin, torch.zeros_like(margin))[:, 0])
    return torch.cat(losses)


def hard_gradient(
    scores: Tensor, winner: Tensor, counts: Tensor, sigma: float, temperature: float, factor: Tensor
) -> Tensor:
    """[2N, K]: factor times the gradient of the sum of `hard_losses` to the scores, in their dtype."""
    gradient = torch.empty_like(scores, memory_format=torch.contiguous_format)
    scale = factor / (2 * sigma**2 * temperature)
    for rows, own, partner, similarity, logits in _row_blocks(scores, winner, sigma, temperature):
        positive = logits.gather(1, partner)
        shares = _add_log_counts_(logits, own, partner, counts)
        total = torch.logaddexp(shares.logsumexp(1, keepdim=True), positive)
        shares.sub_(total).exp_()
        # Two identities instead of two subtractions of nearly equal numbers: a softmax's gradient sums to 0 over its
        # columns, and the loss does not change if all scores of a row are raised.
        shares.scatter_(1, partner, 0)
        shares.scatter_(1, partner, -shares.sum(1, keepdim=True))
        pull = shares.mul_(similarity).scatter_(1, own, 0)
        pull.scatter_(1, own, -pull.sum(1, keepdim=True))
        gradient[rows] = pull.mul_(scale)
    return gradient


def _row_blocks(
    scores: Tensor, winner: Tensor, sigma: float, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of rows: which, own and partner's winner [R, 1], similarities and logits less 1/τ [R, K]."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    partners = winner.roll(len(winner) // 2)
    step = max(1, TILE_ELEMENTS // scores.shape[1])
    for top in range(0, len(scores), step):
        rows = slice(top, min(top + step, len(scores)))
        block = scores[rows].to(dtype)
        own = winner[rows, None]
        exponent = (block - block.gather(1, own)).div_(2 * sigma**2)
        yield rows, own, partners[rows, None], exponent.exp(), exponent.expm1_().div_(temperature)


def _add_log_counts_(logits: Tensor, own: Tensor, partner: Tensor, counts: Tensor) -> Tensor:
    """Adds log n_c in place, where n_c counts a row's negatives only: neither itself nor its positive."""
    at_partner, of_own, of_partner = logits.gather(1, partner), counts[own], counts[partner]
    same = (own == partner).to(counts.dtype)
    logits.add_(counts.to(logits.dtype).log())
    # The logit at the own winner is 0. Where the partner's is the same, the next line has the last word.
    logits.scatter_(1, own, (of_own - 1).to(logits.dtype).log())
    return logits.scatter_(1, partner, at_partner + (of_partner - 1 - same).to(logits.dtype).log())


def prepare(rows: Tensor) -> Tensor:
    """What the functions below want of costs and choices."""
    return rows


def soft_margins(costs: Tensor, choices: Tensor, positive: Tensor, start: int, scales: tuple[float, float]) -> Tensor:
    """[2n] log of the sum over the negatives of exp(logit - positive's). Own choices begin at `start`."""
    buffer = costs.new_empty(TILE_ROWS * TILE_COLUMNS)
    margins = costs.new_full((len(costs),), -math.inf)
    for down, across in _tiles(len(costs), len(choices)):
        logits = _exponents(buffer, costs[down], choices[across], scales[0]).expm1_().mul_(scales[1])
        # Before the sum, not after: it is the difference that has to be accurate.
        logits.sub_(positive[down, None])
        _fill_non_negatives(logits, down, across, start, len(costs), -math.inf)
        margins[down] = torch.logaddexp(margins[down], logits.logsumexp(1))
    return margins


def soft_pull(x: Tensor, y: Tensor, sums: Tensor, start: int, scales: tuple[float, float], of_rows: bool) -> Tensor:
    """[2n, K + 1] sum over the negatives of share times similarity times y.

    sums: [.., 2] of each of the costs: its positive's logit and the log of the sum of all over that.
    of_rows: x are costs and y choices, else choices and costs.
    """
    buffer = x.new_empty(TILE_ROWS * TILE_COLUMNS)
    # A product with denormal numbers is 200 times slower, and nothing this far down reaches the result.
    lowest = 0.9 * math.log(torch.finfo(x.dtype).tiny)
    total = torch.zeros_like(x)
    for down, across in _tiles(len(x), len(y)):
        positive, above = sums[down].split(1, 1) if of_rows else sums[across].T.split(1, 0)
        exponents = _exponents(buffer, x[down], y[across], scales[0])
        shares = exponents.expm1().mul_(scales[1]).sub_(positive).sub_(above)
        shares.add_(exponents).clamp_(min=lowest).exp_()  # share times similarity
        _fill_non_negatives(shares, down, across, start, len(x), 0)
        total[down].addmm_(shares, y[across])
    return total


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, TILE_ROWS):
        for left in range(0, columns, TILE_COLUMNS):
            yield slice(top, min(top + TILE_ROWS, rows)), slice(left, min(left + TILE_COLUMNS, columns))


def _exponents(buffer: Tensor, x: Tensor, y: Tensor, scale: float) -> Tensor:
    """-D / 2σ² of one tile, written into `buffer`."""
    out = buffer[: len(x) * len(y)].view(len(x), len(y))
    return torch.addmm(out, x, y.T, beta=0, alpha=-scale, out=out)


def _fill_non_negatives(values: Tensor, down: slice, across: slice, start: int, rows: int, value: float) -> None:
    """Overwrite what a tile holds of its rows' selves and positives."""
    if across.stop <= start or across.start >= start + rows:
        return
    row = torch.arange(down.start, down.stop, device=values.device)
    column = torch.arange(across.start, across.stop, device=values.device) - start
    partner = torch.where(row < rows // 2, row + rows // 2, row - rows // 2)
    values.masked_fill_((column == row[:, None]) | (column == partner[:, None]), value)
