"""The tiles of NT-Xent in PyTorch: 512 KB of temporaries (1 MB for small batches), whatever the batch.

The matrix is symmetric, so only the upper triangle of tiles is computed; each serves its rows and, mirrored, its
columns. A matrix that is no larger than a few tiles is computed whole and kept for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Two float32 tiles, logits and spare, take 512 KB: they stay in the second-level cache of one core.
TILE_ROWS = 256
TILE_COLUMNS = 256
KEPT_ELEMENTS = 512 * 512  # of exponentials, 1 MB in float32
# A positive's logit has to exceed the others by this share of itself to be a hit: by more than what rounding makes of
# equal ones, which are summed elsewhere in another order and may be products of rows rounded to this dtype.
HIT_SLACK = {torch.float64: 2.0**-46, torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
NORM_FLOOR = 1e-12  # the floor of torch.nn.functional.normalize


class RowSums(NamedTuple):
    """Of the M rows that are this rank's anchors."""

    loss: Tensor  # [M] -log softmax of the positive
    margin: Tensor  # [M] log of the sum over the negatives, less the positive's logit
    log_sums: Tensor  # [M] log of the sum over negatives and positive
    hits: Tensor | None  # [M] bool
    kept: Tensor | None  # what the backward pass can use again


def normalise(z1: Tensor, z2: Tensor, temperature: float, exact_products: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [2N, D] (float32 at least, on a CPU half precision is slower), norms [2N, 1], positive logits [N]."""
    x = torch.cat([z1, z2]).to(torch.float64 if z1.dtype == torch.float64 else torch.float32)
    norms = row_norms(x)
    anchors = x / norms.clamp_min(NORM_FLOOR)
    n = len(z1)
    return anchors, norms, (anchors[:n] * anchors[n:]).sum(1).div_(temperature)


def sum_rows(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    start: int,
    temperature: float,
    exact_products: bool,
    hits: bool,
) -> RowSums:
    """`anchors` are rows `start` and following of `candidates`; `positive` [N] their positives' logits."""
    positive = torch.cat([positive, positive])
    kept = None
    if len(candidates) <= math.isqrt(KEPT_ELEMENTS) and _exponentials_fit(anchors.dtype, temperature):
        kept = _all_exponentials(anchors, candidates, start, temperature)
        negative = kept.sum(1).log_()
        highest = kept.amax(1).log_() if hits else None
    else:
        negative, highest = _log_sum_of_negatives(anchors, candidates, start, temperature, hits)
    margin = negative - positive
    return RowSums(
        loss=torch.logaddexp(margin, torch.zeros_like(margin)),
        margin=margin,
        log_sums=torch.logaddexp(negative, positive),
        hits=None if highest is None else positive - HIT_SLACK[positive.dtype] * positive.abs() > highest,
        kept=kept,
    )


def pull_of_negatives(
    anchors: Tensor,
    candidates: Tensor,
    log_sums: Tensor,
    start: int,
    temperature: float,
    exact_products: bool,
    kept: Tensor | None,
) -> Tensor:
    """Per anchor i: the sum over its negatives j of e_ij (1/l_i + 1/l_j) z_j, [2N, D]."""
    terms = log_sums.neg().exp_()
    own = slice(start, start + len(anchors))
    if kept is not None:
        return torch.add(terms[own, None], terms[None, :]).mul_(kept) @ candidates

    buffer, spare_buffer = anchors.new_empty(2, TILE_ROWS * TILE_COLUMNS)
    total = torch.zeros_like(anchors)
    fit = _exponentials_fit(anchors.dtype, temperature)
    # A product with denormal numbers is 200 times slower, and nothing this far down reaches the result.
    lowest = 0.9 * math.log(torch.finfo(anchors.dtype).tiny)
    if not fit:
        terms = log_sums
    row_terms = terms[own, None]
    for tile in _tiles(len(anchors), len(candidates), start):
        w = _tile_logits(buffer, tile, anchors, candidates, temperature)
        spare = spare_buffer[: w.numel()].view_as(w)
        of_row, of_column = row_terms[tile.rows], terms[None, tile.columns]
        if fit:
            w.exp_().mul_(torch.add(of_row, of_column, out=spare))
        else:
            torch.sub(w, of_row, out=spare).clamp_(min=lowest).exp_()
            w.sub_(of_column).clamp_(min=lowest).exp_().add_(spare)
        _fill_non_negatives(w, tile, start, len(anchors), 0)
        total[tile.rows].addmm_(w, candidates[tile.columns])
        if tile.mirrored is not None:
            total[tile.mirrored].addmm_(w.T, anchors[tile.rows])
    return total


def through_normalisation(
    pull: Tensor,
    z1: Tensor,
    z2: Tensor,
    anchors: Tensor,
    norms: Tensor,
    margin: Tensor,
    upstream: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of both views, [N, D] each: adds the positives' share to `pull`, which is overwritten."""
    n, gradient = len(z1), pull
    share = margin.sigmoid()  # of the negatives in each row's sum
    towards = (share[:n] + share[n:])[:, None]
    gradient[:n].addcmul_(towards, anchors[n:], value=-1)
    gradient[n:].addcmul_(towards, anchors[:n], value=-1)
    radial = (gradient * anchors).sum(1, keepdim=True).mul_(norms >= NORM_FLOOR)
    gradient.addcmul_(radial, anchors, value=-1)
    gradient *= upstream * factor / norms.clamp_min(NORM_FLOOR)
    gradient = gradient.to(z1.dtype)
    return gradient[:n], gradient[n:]


def row_norms(x: Tensor) -> Tensor:
    """[M, D] -> [M, 1], in float64, where the squares of a float32 row cannot overflow."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)


def _all_exponentials(anchors: Tensor, candidates: Tensor, start: int, temperature: float) -> Tensor:
    """exp(logit) of every negative, 0 elsewhere: the whole matrix, for small ones."""
    whole = _Tile(slice(0, len(anchors)), slice(0, len(candidates)), own=True, mirrored=None)
    buffer = anchors.new_empty(len(anchors) * len(candidates))
    e = _tile_logits(buffer, whole, anchors, candidates, temperature).exp_()
    _fill_non_negatives(e, whole, start, len(anchors), 0)
    return e


def _log_sum_of_negatives(
    anchors: Tensor, candidates: Tensor, start: int, temperature: float, want_highest: bool
) -> tuple[Tensor, Tensor | None]:
    """Per anchor: the log of the sum of exp(logit) over its negatives, [2N], -inf where there are none; and the
    highest of their logits, if wanted."""
    buffer = anchors.new_empty(TILE_ROWS * TILE_COLUMNS)
    fit = _exponentials_fit(anchors.dtype, temperature)
    sums = anchors.new_full((len(anchors),), 0 if fit else -math.inf)
    highest = torch.full_like(sums, -math.inf) if want_highest else None
    for tile in _tiles(len(anchors), len(candidates), start):
        logits = _tile_logits(buffer, tile, anchors, candidates, temperature)
        sides = [(tile.rows, 1), *([(tile.mirrored, 0)] if tile.mirrored is not None else [])]
        if highest is not None or not fit:
            _fill_non_negatives(logits, tile, start, len(anchors), -math.inf)
        if highest is not None:
            for rows, side in sides:
                highest[rows] = torch.maximum(highest[rows], logits.amax(side))
        if fit:
            e = logits.exp_()
            if highest is None:
                _fill_non_negatives(e, tile, start, len(anchors), 0)
            for rows, side in sides:
                sums[rows].add_(e.sum(side))
        else:
            for rows, side in sides:
                sums[rows] = torch.logaddexp(sums[rows], logits.logsumexp(side))
    return sums.log_() if fit else sums, highest


class _Tile(NamedTuple):
    rows: slice  # of the anchors
    columns: slice  # of the candidates
    own: bool  # the columns are this rank's, so some of them may be a row's self or positive
    mirrored: slice | None  # the columns as anchors, if no other tile serves these


def _tiles(anchors: int, candidates: int, start: int) -> Iterator[_Tile]:
    """Tiles that cover [anchors, candidates]; of the symmetric block at `start`, the upper triangle only."""
    for top in range(0, anchors, TILE_ROWS):
        bottom = min(top + TILE_ROWS, anchors)
        for first, last, own, mirror in (
            (0, start, False, False),
            (start + top, start + bottom, True, False),
            (start + bottom, start + anchors, True, True),
            (start + anchors, candidates, False, False),
        ):
            for left in range(first, last, TILE_COLUMNS):
                right = min(left + TILE_COLUMNS, last)
                mirrored = slice(left - start, right - start) if mirror else None
                yield _Tile(slice(top, bottom), slice(left, right), own, mirrored)


def _tile_logits(buffer: Tensor, tile: _Tile, anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Cosines / τ of one tile, written into `buffer`."""
    rows, columns = anchors[tile.rows], candidates[tile.columns]
    logits = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
    return torch.addmm(logits, rows, columns.T, beta=0, alpha=1 / temperature, out=logits)


def _fill_non_negatives(values: Tensor, tile: _Tile, start: int, anchors: int, value: float) -> None:
    """Overwrite what a tile holds of its rows' selves and positives: three diagonals of the whole matrix."""
    if not tile.own:
        return
    itself, n = start + tile.rows.start - tile.columns.start, anchors // 2
    if tile.columns.start < start or tile.columns.stop > start + anchors:  # other ranks' columns in the same tile
        values = values[:, start - tile.columns.start :][:, :anchors]
        itself = 0
    for diagonal in (itself - n, itself, itself + n):
        if -values.shape[0] < diagonal < values.shape[1]:
            values.diagonal(diagonal).fill_(value)


def _exponentials_fit(dtype: torch.dtype, temperature: float) -> bool:
    # |logit| <= 1/τ, so exp needs no row maximum while exp(±1/τ) keeps clear of both ends of the range. Half
    # of the exponent is left for the sums. The limit is τ = 0.024 in float32, 0.003 in float64.
    return 1 / temperature <= 0.47 * math.log(torch.finfo(dtype).max)
