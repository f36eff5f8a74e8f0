"""Distance correlation of two sets of features of the same images, bias-corrected or not.

With a_ij = |x_i - x_j| and b_ij = |y_i - y_j|, both centred into A and B,

    R*² or R² = sum A_ij B_ij / sqrt(sum A_ij² sum B_ij²)

where U-centring (Székely & Rizzo 2014) takes a_i./(n-2) + a_.j/(n-2) - a../((n-1)(n-2)) from what is off the diagonal
and leaves zeros on it, and double centring (Székely, Rizzo & Bakirov 2007) takes the means of row and column. Both are
orthogonal projections, so that the derivative of sum A B to a is B, and that to x follows in one matrix product:

    dL/dx_i = sum_j 2 g_ij / a_ij (x_i - x_j),   g = dL/da,   0 where a_ij = 0.

Squared distances come from the inner products of centred rows, which cost what a matrix product costs; nothing of
shape [n, n, p] is made. The parts are those of `kernels.distance_tiled` (PyTorch), for large n of
`kernels.distance_streamed`, which keeps no [n, n] either, or `kernels.fused.distance` (Triton).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import distance_streamed, distance_tiled
from kernels.backends import choose_backend
from kernels.ranks import check_same_on_ranks, gather_rows_with_gradient, group_or_none

# Of so many rows distances are kept on a CPU, 8 MB a matrix, and of more where that is no more than the features have:
# wide ones are dear to be multiplied twice. Else they are made again when they are wanted.
MOST_STORED = 1024


def distance_correlation(
    x: Tensor,
    y: Tensor,
    *,
    unbiased: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much x tells about y, 1 if they are the same up to a motion and a scale.

    Args:
        x: [n, p] features, float16, bfloat16, float32 or float64. One that needs no gradient costs none.
        y: [n, q] features of the same n images, any floating-point dtype, same device.
        unbiased: R*², the bias-corrected squared distance correlation (Székely & Rizzo 2014, arXiv:1310.2926), no
            root: about 0, below as well as above, if x and y are independent. Else R of the V-statistics (Székely,
            Rizzo & Bakirov 2007, arXiv:0803.4101), in [0, 1], which nears 1 in high dimension whatever x and y are,
            and whose slope at R = 0 is infinite (taken as 0 there).
        group: process group whose ranks each hold n of the W·n rows. Every rank returns the value of all rows; its
            gradient is that of this value TIMES W, so that averaging gradients over the ranks gives what one process
            would find. No rank gathers the features: each receives p/W of the columns of all rows (as many numbers
            as it holds), makes their part of the inner products, and the ranks add these, [W·n, W·n]; gradients go
            back the same way. The gradient from above, and which of x and y need one, must be the same on every rank.
        backend: "tiled" and "triton" hold a few arrays [n, n], "tiled" none that would be larger than the
            features (and 8 MB) unless there is a group; "reference" is plain and differentiated by autograd.

    Returns:
        Scalar, float64 if x or y is and float32 otherwise, autocast or not; 0, with gradient 0, if all rows of x or
        of y are the same. Gradients have the dtype of their input; pairs of equal rows add nothing to them. A second
        derivative exists only for the reference.

    Precision: "tiled" computes in float64. "triton" multiplies float32 rows, nearly exactly or in TF32 as
    torch.set_float32_matmul_precision says, measures rows that are close to each other once more by their
    difference, and centres and sums in float64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, fewer than 4 rows (2 if biased) over all ranks, an
            unknown backend, a group without this process, or ranks whose batches differ.
    """
    group = group_or_none(group)
    _check(x, y, unbiased, 1 if group is None else dist.get_world_size(group))
    chosen = choose_backend(backend, x, y)
    if group is not None:
        check_same_on_ranks(x, group)
        check_same_on_ranks(y, group)
    with torch.autocast(x.device.type, enabled=False):
        value = (
            _reference(x, y, unbiased, group)
            if chosen == "reference"
            else _Correlation.apply(x, y, unbiased, group, chosen)
        )
        return value.to(torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32)


def _reference(x: Tensor, y: Tensor, unbiased: bool, group: dist.ProcessGroup | None) -> Tensor:
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    centred = []
    for rows in (x.to(dtype), y.to(dtype)):
        rows = rows if group is None else gather_rows_with_gradient(rows, group)
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        centred.append(distance_tiled.centred(distances, unbiased))
    cross, own_x, own_y = ((centred[i] * centred[j]).sum(dtype=torch.float64) for i, j in ((0, 1), (0, 0), (1, 1)))
    constant = (own_x == 0) | (own_y == 0)
    scale = torch.where(constant, 1, own_x).sqrt() * torch.where(constant, 1, own_y).sqrt()
    squared = cross * torch.where(constant, 0, 1 / scale)
    if unbiased:
        return squared
    none = squared <= 0
    return torch.where(none, 0, torch.where(none, 1, squared).sqrt())


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, unbiased: bool, group: dist.ProcessGroup | None, backend: str
    ) -> Tensor:
        if (
            backend == "tiled"
            and x.device.type == "cpu"
            and group is None
            and len(x) > max(MOST_STORED, x.shape[1], y.shape[1])
        ):
            backend = "streamed"
        parts = _implementation(backend)
        sides = []
        for rows, needs_gradient in ((x, ctx.needs_input_grad[0]), (y, ctx.needs_input_grad[1])):
            columns = rows if group is None else _columns_of_all_rows(rows, group)
            side = parts.distances(columns, group)
            sides.append(side if needs_gradient else side._replace(rows=None))
        cross, own_x, own_y = parts.moments(sides[0], sides[1], unbiased)
        # NaN is neither constant nor without correlation: it comes out as NaN.
        constant = (own_x == 0) | (own_y == 0)
        own_x, own_y = torch.where(constant, 1, own_x), torch.where(constant, 1, own_y)
        slope = torch.where(constant, 0, own_x.rsqrt() * own_y.rsqrt())
        value = cross * slope
        to_x, to_y = -value / (2 * own_x), -value / (2 * own_y)
        if not unbiased:
            root = value.clamp_min(0).sqrt()
            of_root = torch.where(root == 0, 0, 0.5 / torch.where(root == 0, 1, root))
            value, slope, to_x, to_y = root, slope * of_root, to_x * of_root, to_y * of_root
        ctx.save_for_backward(*sides[0], *sides[1], torch.stack([slope, to_x]), torch.stack([slope, to_y]))
        ctx.unbiased, ctx.group, ctx.backend = unbiased, group, backend
        ctx.shapes = (x.shape, y.shape)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = _implementation(ctx.backend)
        *saved, slopes_x, slopes_y = ctx.saved_tensors
        of_x, of_y = parts.Side(*saved[: len(saved) // 2]), parts.Side(*saved[len(saved) // 2 :])
        gradients: list[Tensor | None] = []
        for own, other, slopes, shape in (
            (of_x, of_y, slopes_x, ctx.shapes[0]),
            (of_y, of_x, slopes_y, ctx.shapes[1]),
        ):
            if own.rows is None:
                gradients.append(None)
                continue
            with torch.autocast(own.rows.device.type, enabled=False):
                world = 1 if ctx.group is None else dist.get_world_size(ctx.group)
                gradient = parts.gradient(own, other, slopes * (upstream * world), ctx.unbiased)
            gradients.append(gradient if ctx.group is None else _rows_of_all_columns(gradient, shape[1], ctx.group))
        return *gradients, None, None, None


def _columns_of_all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, p] on each rank -> [W·n, p/W]: this rank's share of the columns, padded with zeros to as many on each."""
    world, (n, p) = dist.get_world_size(group), rows.shape
    share = -(-p // world)
    send = F.pad(rows, (0, world * share - p)).view(n, world, share).transpose(0, 1).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.view(world * n, share)


def _rows_of_all_columns(columns: Tensor, p: int, group: dist.ProcessGroup) -> Tensor:
    """[W·n, p/W] -> [n, p]: back to whole rows."""
    world = dist.get_world_size(group)
    send = columns.contiguous().view(world, len(columns) // world, columns.shape[1])
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.transpose(0, 1).reshape(send.shape[1], -1)[:, :p]


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from kernels.fused import distance as fused

        return fused
    return distance_streamed if backend == "streamed" else distance_tiled


def _check(x: Tensor, y: Tensor, unbiased: bool, world: int) -> None:
    for name, rows in (("x", x), ("y", y)):
        if rows.dim() != 2 or 0 in rows.shape:
            raise ValueError(f"{name} has shape {list(rows.shape)}, expected [n, features] with neither of them 0")
        if not rows.is_floating_point():
            raise ValueError(f"{name} has dtype {rows.dtype}, expected a floating-point dtype")
    if len(x) != len(y) or x.device != y.device:
        raise ValueError(
            "x and y are features of the same images, but there are "
            f"{len(x)} rows on {x.device} and {len(y)} rows on {y.device}"
        )
    least = 4 if unbiased else 2
    if world * len(x) < least:
        raise ValueError(
            f"{world * len(x)} rows over all ranks, expected at least {least} "
            f"({'the bias-corrected statistic divides by n - 3' if unbiased else 'one row has no distances'})"
        )
