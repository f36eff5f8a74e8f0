"""NT-Xent, the contrastive loss of SimCLR, exact and without the 2N x 2N matrix it is defined on.

All that the loss needs of the matrix of similarities is one sum a row, so it is visited in tiles, each used and
forgotten. The backward pass makes the tiles again; one exponential gives the softmax of row and of column, because
the matrix is symmetric:

    dL/dz_i = 1/(2N τ) [ sum_j e_ij (1/l_i + 1/l_j) z_j + c_i z_p(i) ]

where e_ij = exp(z_i.z_j / τ), j runs over the negatives of i, p(i) is its positive, l_i the row sum of both.
The positives stay out of the tiles, so that c_i = -(neg_i/l_i + neg_p/l_p) needs no subtraction. It equals
P_ip + P_pi - 2, which has no digits left once training has gone well and P_ip is near 1. It also keeps the largest
term of the gradient out of the half-precision product that the fused kernels make of the others.

The tiles are those of `kernels.ntxent_tiled` (PyTorch) or `kernels.fused.ntxent` (Triton).
"""

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import ntxent_tiled
from kernels.backends import choose_backend, tf32_allowed
from kernels.ranks import check_same_on_ranks, gather_rows, gather_rows_with_gradient, group_or_none

NORM_FLOOR = ntxent_tiled.NORM_FLOOR


def ntxent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    return_hits: bool = False,
    backend: str = "auto",
) -> Any:
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
        return_hits: also tell which anchors are closer to their positive than to every negative.
        backend: "tiled" and "triton" never hold an array of 2N x 2N ("tiled" does up to 2N = 512, 1 MB);
            "reference" does, in plain operations, and is there to be compared with; "auto" picks the fastest for the
            device.

    Returns:
        Scalar, float64 for float64 inputs and float32 otherwise; with `return_hits` also [2N] bool, of this rank's
        anchors, first all of `z1`, then all of `z2`: their mean is the accuracy of the contrastive task. A positive
        that ties with a negative, but for rounding, is no hit, so that a collapsed encoder scores 0.
        Gradients have the dtype of their input. A second derivative exists only for the reference without a group.

    Precision: normalisation, positives, exponentials and sums are float32, and so are the products with the
    negatives in "tiled" and "reference". In "triton" these are products of unit rows rounded to float16 for half
    precision inputs, under autocast, or if torch.set_float32_matmul_precision allows TF32; of float32 otherwise.
    A negative with less than 2e-12 of a row's softmax does not count in its gradient there.

    Raises:
        ValueError: shapes, dtypes or devices that differ or do not fit, a temperature that is not positive
            and finite, an unknown backend, a group without this process, or ranks whose batches differ.
    """
    _check(z1, z2, temperature)
    chosen = choose_backend(backend, z1, z2)
    group = group_or_none(group)
    if group is not None:
        check_same_on_ranks(z1, group)
    exact_products = _exact_products(z1)
    with torch.autocast(z1.device.type, enabled=False):
        if chosen == "reference":
            loss, hits = _reference(z1, z2, temperature, group)
        else:
            loss, hits = _NTXent.apply(z1, z2, temperature, group, return_hits, chosen, exact_products)
    return (loss, hits) if return_hits else loss


def _reference(z1: Tensor, z2: Tensor, temperature: float, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    z1, z2 = z1.to(dtype), z2.to(dtype)
    first, n = 0, len(z1)
    if group is not None:
        first = n * dist.get_rank(group)
        z1, z2 = gather_rows_with_gradient(z1, group), gather_rows_with_gradient(z2, group)
    x = torch.cat([z1, z2])
    z = x / ntxent_tiled.row_norms(x).clamp_min(NORM_FLOOR)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    loss = F.cross_entropy(logits, positive)
    with torch.no_grad():
        others = logits.scatter(1, positive[:, None], -math.inf).amax(1)
        own = logits.gather(1, positive[:, None])[:, 0]
        hits = own - ntxent_tiled.HIT_SLACK[dtype] * own.abs() > others
    return loss, hits.view(2, -1)[:, first : first + n].flatten()


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        return_hits: bool,
        backend: str,
        exact_products: bool,
    ) -> tuple[Tensor, Tensor | None]:
        parts = _implementation(backend)
        anchors, norms, positive = parts.normalise(z1, z2, temperature, exact_products)
        candidates = anchors if group is None else gather_rows(anchors, group)
        start = 0 if group is None else len(anchors) * dist.get_rank(group)
        rows = parts.sum_rows(anchors, candidates, positive, start, temperature, exact_products, return_hits)

        loss, log_sums = rows.loss.mean(), rows.log_sums
        if group is not None:
            # All that the backward pass wants from other ranks, so that it can run without waiting for them.
            log_sums = gather_rows(log_sums, group)
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
        ctx.save_for_backward(z1, z2, anchors, candidates, norms, rows.margin, log_sums, rows.kept)
        ctx.start, ctx.temperature, ctx.backend, ctx.exact_products = start, temperature, backend, exact_products
        if rows.hits is not None:
            ctx.mark_non_differentiable(rows.hits)
        return loss, rows.hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z1, z2, anchors, candidates, norms, margin, log_sums, kept = ctx.saved_tensors
        parts = _implementation(ctx.backend)
        with torch.autocast(z1.device.type, enabled=False):
            pull = parts.pull_of_negatives(
                anchors, candidates, log_sums, ctx.start, ctx.temperature, ctx.exact_products, kept
            )
            # One rank's 2N rows, not the global count: that is the factor W promised above.
            factor = 1 / (2 * len(z1) * ctx.temperature)
            gradients = parts.through_normalisation(pull, z1, z2, anchors, norms, margin, upstream, factor)
        return *gradients, None, None, None, None, None


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from kernels.fused import ntxent as fused

        return fused
    return ntxent_tiled


def _exact_products(z: Tensor) -> bool:
    """Whether the Triton kernels owe float32 products, by the rules of torch.matmul."""
    asked = z.dtype == torch.float32 and not torch.is_autocast_enabled(z.device.type)
    return asked and not tf32_allowed()


def _check(z1: Tensor, z2: Tensor, temperature: float) -> None:
    for name, z in (("z1", z1), ("z2", z2)):
        if z.dim() != 2 or 0 in z.shape:
            raise ValueError(f"{name} has shape {list(z.shape)}, expected [N, D] with N >= 1 and D >= 1")
        if not z.is_floating_point():
            raise ValueError(f"{name} has dtype {z.dtype}, expected a floating-point dtype")
    for what in ("shape", "dtype", "device"):
        first, second = getattr(z1, what), getattr(z2, what)
        if first != second:
            raise ValueError(f"z1 and z2 are two views of one batch, but their {what}s are {first} and {second}")
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    if isinstance(temperature, Tensor):
        raise TypeError("temperature is a tensor, expected a number; to learn it, scale what goes into the loss")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0 (0.1 to 0.5 is usual)")
