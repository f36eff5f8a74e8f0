"""NT-Xent, the contrastive loss of SimCLR, exact and without the 2N x 2N matrix it is defined on.

The matrix of similarities is symmetric, and all that the loss needs of it is one sum a row. So it is visited
in tiles, each computed into the same small buffer, used for its rows and (mirrored) for its columns, and
forgotten. The backward pass makes the tiles again; one exponential gives the softmax of row and column:

    dL/dz_i = 1/(2N τ) [ sum_j e_ij (1/l_i + 1/l_j) z_j + c_i z_p(i) ]

where e_ij = exp(z_i.z_j / τ), j runs over the negatives of i, p(i) is its positive, l_i the row sum of both.
The positives stay out of the tiles, so that c_i = -(neg_i/l_i + neg_p/l_p) needs no subtraction. It equals
P_ip + P_pi - 2, which has no digits left once training has gone well and P_ip is near 1.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("auto", "tiled", "reference")

# Two float32 tiles, logits and spare, take 512 KB: they stay in the second-level cache of one core.
TILE_ROWS = 256
TILE_COLUMNS = 256
NORM_FLOOR = 1e-12  # the floor of torch.nn.functional.normalize

_matched_batches: set[tuple[str, int, int, torch.dtype]] = set()


def ntxent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean NT-Xent loss over the 2N anchors of two views (Chen et al. 2020, arXiv:2002.05709, equation 1).

    Rows are L2-normalised inside (norms below 1e-12 count as 1e-12, so a zero row gives no NaN). Row i of
    `z1` and row i of `z2` are each other's positive; the other 2N - 2 rows of the two views are the negatives
    of both. With N = 1 there is no negative and the loss is 0.

    Args:
        z1: [N, D] first view, float16, bfloat16, float32 or float64.
        z2: [N, D] second view, same shape, dtype and device.
        temperature: τ > 0; the logits are cosines / τ.
        group: process group whose ranks each hold N of the W·N pairs. Negatives then span all ranks. Every
            rank returns the global mean; its gradient is that of the global mean TIMES W, so that averaging
            gradients over the ranks, as data parallel training does, gives what one process would find for
            the whole batch. The gradient from above (a loss scale, say) must be the same on every rank.
        backend: "tiled" never holds an array of 2N x 2N; "reference" does, in plain operations, and is there
            to be compared with; "auto" picks the fastest for the device.

    Returns:
        Scalar, float64 for float64 inputs and float32 otherwise: half precision is computed in float32,
        autocast or not. Gradients have the dtype of their input. A second derivative exists only for the
        reference without a group.

    Raises:
        ValueError: shapes, dtypes or devices that differ or do not fit, a temperature that is not positive
            and finite, an unknown backend, a group without this process, or ranks whose batches differ.
    """
    _check(z1, z2, temperature, backend)
    if group is not None:
        _check_group(z1, group)
        if dist.get_world_size(group) == 1:
            group = None
    with torch.autocast(z1.device.type, enabled=False):
        if backend == "reference":
            return _reference(z1, z2, temperature, group)
        return _TiledNTXent.apply(z1, z2, temperature, group)


def _reference(z1: Tensor, z2: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    z1, z2 = z1.to(_compute_dtype(z1)), z2.to(_compute_dtype(z2))
    if group is not None:
        z1, z2 = _GatherRows.apply(z1, group), _GatherRows.apply(z2, group)
    x = torch.cat([z1, z2])
    z = x / _row_norms(x).clamp_min(NORM_FLOOR)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, positive)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows. Backward sums the gradients of W equal losses: so W enters the reference."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.start, ctx.rows = group, dist.get_rank(group) * len(rows), len(rows)
        return _gather(rows.contiguous(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.start : ctx.start + ctx.rows], None


class _TiledNTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
        x = torch.cat([z1, z2]).to(_compute_dtype(z1))
        norms = _row_norms(x)
        anchors = x / norms.clamp_min(NORM_FLOOR)
        del x
        n = len(z1)
        positive = (anchors[:n] * anchors[n:]).sum(1).div_(temperature)
        positive = torch.cat([positive, positive])

        candidates = anchors if group is None else _gather(anchors, group)
        start = 0 if group is None else 2 * n * dist.get_rank(group)
        negative = _log_sum_of_negatives(anchors, candidates, start, temperature)

        margin = negative - positive
        loss = torch.logaddexp(margin, torch.zeros_like(margin)).mean()
        log_sums = torch.logaddexp(negative, positive)
        if group is not None:
            # All that the backward pass wants from other ranks, so that it can run without waiting for them.
            log_sums = _gather(log_sums, group)
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
        ctx.save_for_backward(anchors, candidates, norms, margin, log_sums)
        ctx.start, ctx.temperature, ctx.input_dtype = start, temperature, z1.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        anchors, candidates, norms, margin, log_sums = ctx.saved_tensors
        n = len(anchors) // 2
        with torch.autocast(anchors.device.type, enabled=False):
            gradient = _pull_of_negatives(anchors, candidates, log_sums, ctx.start, ctx.temperature)
            share = margin.sigmoid()  # of the negatives in each row's sum
            pull = (share[:n] + share[n:])[:, None]
            gradient[:n].addcmul_(pull, anchors[n:], value=-1)
            gradient[n:].addcmul_(pull, anchors[:n], value=-1)
            radial = (gradient * anchors).sum(1, keepdim=True).mul_(norms >= NORM_FLOOR)
            gradient.addcmul_(radial, anchors, value=-1)
            # One rank's 2n rows, not the global count: that is the factor W promised above.
            gradient *= upstream / (2 * n * ctx.temperature * norms.clamp_min(NORM_FLOOR))
            gradient = gradient.to(ctx.input_dtype)
        return gradient[:n], gradient[n:], None, None


def _log_sum_of_negatives(anchors: Tensor, candidates: Tensor, start: int, temperature: float) -> Tensor:
    """Per anchor: the log of the sum of exp(logit) over its negatives, [2N]; -inf where there are none."""
    buffer = anchors.new_empty(TILE_ROWS * TILE_COLUMNS)
    if _exponentials_fit(anchors.dtype, temperature):
        sums = anchors.new_zeros(len(anchors))
        for tile in _tiles(len(anchors), len(candidates), start):
            e = _tile_logits(buffer, tile, anchors, candidates, temperature).exp_()
            _fill_non_negatives(e, tile, start, len(anchors), 0)
            sums[tile.rows].add_(e.sum(1))
            if tile.mirrored is not None:
                sums[tile.mirrored].add_(e.sum(0))
        return sums.log_()
    log_sums = anchors.new_full((len(anchors),), -math.inf)
    for tile in _tiles(len(anchors), len(candidates), start):
        logits = _tile_logits(buffer, tile, anchors, candidates, temperature)
        _fill_non_negatives(logits, tile, start, len(anchors), -math.inf)
        log_sums[tile.rows] = torch.logaddexp(log_sums[tile.rows], logits.logsumexp(1))
        if tile.mirrored is not None:
            log_sums[tile.mirrored] = torch.logaddexp(log_sums[tile.mirrored], logits.logsumexp(0))
    return log_sums


def _pull_of_negatives(anchors: Tensor, candidates: Tensor, log_sums: Tensor, start: int, temperature: float) -> Tensor:
    """Per anchor i: the sum over its negatives j of e_ij (1/l_i + 1/l_j) z_j, [2N, D]."""
    buffer, spare_buffer = anchors.new_empty(2, TILE_ROWS * TILE_COLUMNS)
    total = torch.zeros_like(anchors)
    fit = _exponentials_fit(anchors.dtype, temperature)
    # A product with denormal numbers is 200 times slower, and nothing this far down reaches the result.
    lowest = 0.9 * math.log(torch.finfo(anchors.dtype).tiny)
    terms = log_sums.neg().exp_() if fit else log_sums  # 1/l or log l, of every candidate
    row_terms = terms[start : start + len(anchors), None]
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
    for diagonal in (itself - n, itself, itself + n):
        if -values.shape[0] < diagonal < values.shape[1]:
            values.diagonal(diagonal).fill_(value)


def _exponentials_fit(dtype: torch.dtype, temperature: float) -> bool:
    # |logit| <= 1/τ, so exp needs no row maximum while exp(±1/τ) keeps clear of both ends of the range. Half
    # of the exponent is left for the sums. The limit is τ = 0.024 in float32, 0.003 in float64.
    return 1 / temperature <= 0.47 * math.log(torch.finfo(dtype).max)


def _row_norms(x: Tensor) -> Tensor:
    # In float64, where the squares of a float32 row cannot overflow.
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered


def _check(z1: Tensor, z2: Tensor, temperature: float, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    for name, z in (("z1", z1), ("z2", z2)):
        if z.dim() != 2 or 0 in z.shape:
            raise ValueError(f"{name} has shape {list(z.shape)}, expected [N, D] with N >= 1 and D >= 1")
        if not z.is_floating_point():
            raise ValueError(f"{name} has dtype {z.dtype}, expected a floating-point dtype")
    for what in ("shape", "dtype", "device"):
        first, second = getattr(z1, what), getattr(z2, what)
        if first != second:
            raise ValueError(f"z1 and z2 are two views of one batch, but their {what}s are {first} and {second}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0 (0.1 to 0.5 is usual)")


def _check_group(z: Tensor, group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the group; pass a group that it belongs to")
    # Reading sizes back would stall a GPU in every step, so there a shape is compared when it first comes up.
    known = (group.group_name, *z.shape, z.dtype)
    if z.device.type != "cpu" and known in _matched_batches:
        return
    mine = torch.tensor([*z.shape, z.element_size()], device=z.device)
    shapes = _gather(mine[None], group)
    if not torch.equal(shapes, mine.expand_as(shapes)):
        raise ValueError(
            f"ranks hold batches of different shape or dtype ([N, D, bytes] by rank: {shapes.tolist()}), "
            "expected the same on all; drop or pad the last batch"
        )
    _matched_batches.add(known)
