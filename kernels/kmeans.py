"""One step of k-means: the nearest centre of each row, and per centre the sum and the number of its rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backends import choose_backend
from kernels.nearest_cpu import best_one
from kernels.ranks import group_or_none

METRICS = ("cosine", "euclidean")
NORM_FLOOR = 1e-12  # the floor of torch.nn.functional.normalize
_BLOCK_ROWS = 4096


@torch.no_grad()
def kmeans_assign(
    x: Tensor,
    centres: Tensor,
    *,
    metric: str = "cosine",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns each row to a centre, and sums what each centre got; no [M, K] array.

    "cosine" is spherical k-means (Dhillon and Modha 2001): rows and centres are normalised inside (norms below
    1e-12 count as 1e-12), a row goes to the centre of largest cosine, and the sums are of the normalised rows.
    "euclidean" is Lloyd's: rows as given, smallest distance, as the largest <x, c> - |c|²/2. Equally good centres:
    the lowest index. The same inputs give the same sums to the last bit (but for float64 on a GPU). Where the mean of
    the rows is large against their spread, subtract it first: the difference of <x, c> and |c|²/2 loses digits there.

    Args:
        x: [M, D], any floating dtype; computed in float32 (float64 where either is float64). M may be 0.
        centres: [K, D], on the same device; need not be normalised.
        metric: "cosine" or "euclidean".
        group: process group; sums and counts are then those of all its ranks' rows, whose numbers may differ.
        backend: as for `nearest`.

    Returns:
        ids [M] int64 (of this rank's rows), sums [K, D] float32 (float64), counts [K] int64. The new centre is
        sums / counts, normalised for "cosine"; a centre that got no row has sum 0 and count 0.

    Raises:
        ValueError: shapes, devices, metric or backend do not fit, or this process is not in the group.
    """
    _check(x, centres, metric)
    backend = choose_backend(backend, x, centres)
    group = group_or_none(group)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "triton" and len(x) > 0:
            from kernels.fused.kmeans import fused_assign

            ids, sums, counts = fused_assign(x, centres, metric)
        elif backend == "reference":
            ids, sums, counts = _reference(x, centres, metric)
        else:
            ids, sums, counts = _tiled(x, centres, metric)
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(counts, group=group)
    return ids, sums, counts


def _tiled(x: Tensor, centres: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _computed(x, centres)
    centres = centres.to(dtype)
    sums = torch.zeros_like(centres, memory_format=torch.contiguous_format)
    if metric == "cosine":
        _, ids = best_one(x, centres / _norms(centres))
    else:
        _, ids = best_one(x, centres, bias=_half_squares(centres))
    ids.clamp_(min=0)  # a row of NaN has no nearest centre
    for top in range(0, len(x), _BLOCK_ROWS):
        rows = x[top : top + _BLOCK_ROWS].to(dtype)
        sums.index_add_(0, ids[top : top + _BLOCK_ROWS], rows / _norms(rows) if metric == "cosine" else rows)
    return ids, sums, torch.bincount(ids, minlength=len(centres))


def _reference(x: Tensor, centres: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _computed(x, centres)
    x, centres = x.to(dtype), centres.to(dtype)
    if metric == "cosine":
        x = x / _norms(x)
        scores = x @ (centres / _norms(centres)).T
    else:
        scores = x @ centres.T + _half_squares(centres)
    ids = scores.argmax(1)
    chosen = torch.nn.functional.one_hot(ids, len(centres))
    return ids, chosen.to(dtype).T @ x, chosen.sum(0)


def _half_squares(centres: Tensor) -> Tensor:
    return centres.square().sum(1).mul_(-0.5)


def _norms(rows: Tensor) -> Tensor:
    """[M, 1]. Squares of float32 that leave its range are taken in float64, which is slow on a CPU."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if rows.dtype == torch.float32 and not bool(((norms > 1e-15) & (norms < 1e15)).all()):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
    return norms.clamp_min_(NORM_FLOOR)


def _computed(x: Tensor, centres: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, centres.dtype), torch.float32)


def _check(x: Tensor, centres: Tensor, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if x.dim() != 2 or centres.dim() != 2 or x.shape[1] != centres.shape[1] or 0 in centres.shape:
        raise ValueError(
            f"x [M, D] and centres [K, D] must share D, with K and D >= 1, got {list(x.shape)} and "
            f"{list(centres.shape)}"
        )
    for name, rows in (("x", x), ("centres", centres)):
        if not rows.is_floating_point():
            raise ValueError(f"{name} has dtype {rows.dtype}, expected a floating-point dtype")
    if x.device != centres.device:
        raise ValueError(f"x is on {x.device} and the centres on {centres.device}, expected one device")
