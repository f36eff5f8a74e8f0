"""The contrastive loss on the simplex (probabilistic SimCLR), without its N x N matrix.

A row of an embedding is read as a posterior over C latent classes, and the inner product of two posteriors is the
probability that two views share their class. With r_ij = max(N <π1_i, π2_j>, floor), R_i and C_j the sums of r^(1/T)
over row i and column j, and i's partner in the other view its positive,

    L = 1/(2N) sum_i [ log R_i + log C_i - 2 log(r_ii) / T ]
    dL/dr_ij = 1/(2N T) r_ij^(1/T - 1) (1/R_i + 1/C_j)   for i != j and r_ij above the floor.

One visit of the matrix in tiles gives the sums of rows and columns, another both gradients. The positives stay out of
the tiles, so that the digits of a small loss and of its gradient are not lost in a subtraction from 1. A posterior's
gradient is only wanted up to a constant (its sum is 1), so 1/C is taken from the posteriors that a row is pulled by:
near the uniform posterior, where training starts, nothing else would be left of the sum but rounding.

The tiles are those of `kernels.simplex_tiled` (PyTorch) or `kernels.fused.simplex` (Triton).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import simplex_tiled
from kernels.backends import choose_backend
from kernels.ranks import (
    check_same_on_ranks,
    exchange_parts,
    gather_rows,
    gather_rows_with_gradient,
    group_or_none,
)


def simplex_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.8,
    floor: float = 1e-4,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over the 2N anchors of -log of the positive's share in r^(1/T), cross-view candidates only.

    The loss of github.com/sylviesss's SimCLR ("modified loss"): u = softplus_beta(z), π = u / sum u along a row,
    r_ij = max(N <π1_i, π2_j>, floor), logits log(r) / T, cross-entropy along rows and along columns. Row i of `z1`
    and row i of `z2` are each other's positive, the N - 1 other rows of the other view are the negatives. At T = 1
    the softmax is the Bayes-optimal answer to "which of the rows is my partner?". The logarithm of softplus is
    computed as such: rows far below zero keep their posterior, where exp would underflow.

    Args:
        z1: [N, C] first view, float16, bfloat16, float32 or float64; any real numbers.
        z2: [N, C] second view, same shape, dtype and device.
        temperature: T > 0; any, the powers r^(1/T) are summed in log space where they would overflow.
        beta: sharpness of softplus, > 0.
        floor: least r, > 0. No gradient flows where it acts, as in torch.clamp.
        group: process group whose ranks each hold N of the W·N pairs; the N of the formula is then W·N. Every rank
            returns the global mean; its gradient is that of the global mean TIMES W, so that averaging gradients
            over the ranks gives what one process would find for the whole batch. What travels is the posteriors and
            three numbers a row, no gradient. The gradient from above must be the same on every rank.
        backend: "tiled" and "triton" never hold an array of N x N; "reference" does, in plain operations.

    Returns:
        Scalar, float64 for float64 inputs and float32 otherwise, autocast or not. Gradients have the dtype of their
        input. A second derivative exists only for the reference without a group.

    Precision: posteriors are float32 (float64 for float64 inputs). In "triton" their products are TF32 where inputs
    are half precision, autocast is on or torch.set_float32_matmul_precision allows it, and float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that differ or do not fit, a temperature, beta or floor that is not
            positive and finite, an unknown backend, a group without this process, or ranks whose batches differ.
    """
    _check(z1, z2, temperature, beta, floor)
    chosen = choose_backend(backend, z1, z2)
    group = group_or_none(group)
    if group is not None:
        check_same_on_ranks(z1, group)
    fast = z1.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(z1.device.type)
    with torch.autocast(z1.device.type, enabled=False):
        if chosen == "reference":
            return _reference(z1, z2, temperature, beta, floor, group)
        loss: Tensor = _Simplex.apply(z1, z2, temperature, beta, floor, group, chosen, fast)
        return loss


def _reference(
    z1: Tensor, z2: Tensor, temperature: float, beta: float, floor: float, group: dist.ProcessGroup | None
) -> Tensor:
    posterior1, posterior2 = (F.softmax(simplex_tiled.log_softplus(z, beta), dim=1) for z in (z1, z2))
    if group is not None:
        posterior1 = gather_rows_with_gradient(posterior1, group)
        posterior2 = gather_rows_with_gradient(posterior2, group)
    n = len(posterior1)
    logits = (n * posterior1 @ posterior2.T).clamp_min(floor).log() / temperature
    positive = torch.arange(n, device=z1.device)
    return (F.cross_entropy(logits, positive) + F.cross_entropy(logits.T, positive)) / 2


class _Simplex(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        temperature: float,
        beta: float,
        floor: float,
        group: dist.ProcessGroup | None,
        backend: str,
        fast: bool,
    ) -> Tensor:
        parts = _implementation(backend)
        n, world = len(z1), 1 if group is None else dist.get_world_size(group)
        start = 0 if group is None else n * dist.get_rank(group)
        settings = simplex_tiled.Settings(temperature, floor, z1.shape[1], world * n, fast)

        posterior1, posterior2, agreement = parts.posteriors(z1, z2, beta)
        candidates2 = posterior2 if group is None else gather_rows(posterior2, group)
        of_rows, of_columns = parts.log_sums(posterior1, candidates2, start, settings)
        if group is not None:
            # Each rank has the part of its own rows of every column's sum; a column's parts go to the rank it is of.
            of_columns = exchange_parts(of_columns, group).logsumexp(0)
        ratio = agreement.mul(world * n)
        positive = ratio.clamp_min(floor).log_().div_(temperature)
        margin1, margin2 = of_rows - positive, of_columns - positive
        zero = torch.zeros_like(positive)
        loss = (torch.logaddexp(margin1, zero) + torch.logaddexp(margin2, zero)).mean() / 2

        log_rows, log_columns = torch.logaddexp(of_rows, positive), torch.logaddexp(of_columns, positive)
        candidates1 = posterior1
        if group is not None:
            # All that the backward pass wants from other ranks, so that it can run without waiting for them.
            candidates1 = gather_rows(posterior1, group)
            log_rows, log_columns = gather_rows(torch.stack([log_rows, log_columns], 1), group).T.contiguous()
            dist.all_reduce(loss, group=group)
            loss /= world
        # N dL/dr_ii without the factor that all terms share: what each anchor lacks of certainty, per r.
        repulsion = torch.where(ratio < floor, zero, (margin1.sigmoid() + margin2.sigmoid()) / ratio)
        ctx.save_for_backward(
            z1, z2, posterior1, posterior2, candidates1, candidates2, log_rows, log_columns, repulsion
        )
        ctx.start, ctx.beta, ctx.settings, ctx.backend, ctx.alone = start, beta, settings, backend, group is None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, posterior1, posterior2, candidates1, candidates2, log_rows, log_columns, repulsion = ctx.saved_tensors
        parts = _implementation(ctx.backend)
        own = slice(ctx.start, ctx.start + len(z1))
        with torch.autocast(z1.device.type, enabled=False):
            if ctx.alone:
                pull1, pull2 = parts.pull_both(posterior1, posterior2, log_rows, log_columns, ctx.settings)
            else:
                pull1 = parts.pull(posterior1, candidates2, log_rows[own], log_columns, ctx.start, ctx.settings)
                pull2 = parts.pull(posterior2, candidates1, log_columns[own], log_rows, ctx.start, ctx.settings)
            # 1/2n of this rank's rows times N of r = N <π1, π2>: the W in N is the factor promised above.
            factor = upstream * (ctx.settings.total / (2 * len(z1) * ctx.settings.temperature))
            gradient1 = parts.through_posterior(z1, posterior1, pull1, posterior2, repulsion, factor, ctx.beta)
            gradient2 = parts.through_posterior(z2, posterior2, pull2, posterior1, repulsion, factor, ctx.beta)
        return gradient1, gradient2, None, None, None, None, None, None


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from kernels.fused import simplex as fused

        return fused
    return simplex_tiled


def _check(z1: Tensor, z2: Tensor, temperature: float, beta: float, floor: float) -> None:
    for name, z in (("z1", z1), ("z2", z2)):
        if z.dim() != 2 or 0 in z.shape:
            raise ValueError(f"{name} has shape {list(z.shape)}, expected [N, C] with N >= 1 and C >= 1")
        if not z.is_floating_point():
            raise ValueError(f"{name} has dtype {z.dtype}, expected a floating-point dtype")
    for what in ("shape", "dtype", "device"):
        first, second = getattr(z1, what), getattr(z2, what)
        if first != second:
            raise ValueError(f"z1 and z2 are two views of one batch, but their {what}s are {first} and {second}")
    for name, value, usual in (("temperature", temperature, 1.0), ("beta", beta, 0.8), ("floor", floor, 1e-4)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected a finite number above 0 ({usual} is usual)")
