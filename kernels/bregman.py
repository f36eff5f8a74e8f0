"""Functional Bregman contrastive loss (BeCLR), without the 2N x 2N matrix it is defined on.

K subnetworks score each of the 2N views; the highest score m_i = s_ic of a view names its winner c = c_i. Then

    D_ij = m_i - s_i,c_j        sim_ij = exp(-D_ij / 2σ²)        logit_ij = sim_ij / τ

is all that a softmax over the other 2N - 1 views needs, with the other view of the same image as the positive. What
column j contributes depends on its winner only, so K winners with their counts n_c stand for 2N columns:

    sum_{j != i} exp(logit_ij) = sum_c n_c exp(logit_ic), one less of i's own winner,

exact, in O(N·K). The own view and the positive are taken from the integer counts, not from the sum. Logits are kept as
expm1(-D / 2σ²) / τ, their distance from the highest, so that small divergences keep their digits.

A soft winner, weights w_j over the K subnetworks instead of one, has no such short cut: D_ij = m_i - <w_j, s_i>, a
matrix product, is visited in tiles, O(N²·K) in time and O(N·K) in memory.

The parts are those of `kernels.bregman_tiled` (PyTorch) or `kernels.fused.bregman` (Triton).
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

from kernels import bregman_tiled
from kernels.backends import choose_backend
from kernels.ranks import check_same_on_ranks, gather_rows, gather_rows_with_gradient, group_or_none


def bregman_loss(
    scores1: Tensor,
    scores2: Tensor,
    *,
    sigma: float = 0.9,
    temperature: float,
    weights: tuple[Tensor, Tensor] | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over the 2N anchors of the Bregman contrastive loss (Rezaei et al. 2021, arXiv:2109.07455).

    Row i of `scores1` and row i of `scores2` are each other's positive; the other 2N - 2 views are the negatives of
    both. A winner is the lowest index among equal scores; gradient flows to the winner's score m_i and to s_i,c_j
    alike, none through the choice itself. If all views share one winner the loss is log(2N - 1) and its gradient zero:
    a state that hard winners never leave and soft ones do.

    With `weights`, view j's winner is soft: D_ij = m_i - sum_k w_jk s_ik, where m_i stays the highest score of i. So
    D_ij >= 0 and sim_ij in (0, 1] hold for any rows that are not negative and sum to 1, and one-hot rows at the
    winners give the hard loss, to which softmax(scores / temperature) may be annealed. Gradients flow to scores and
    weights, so also through the choice, if weights are a function of the scores; detach them if that is not wanted.

    Args:
        scores1: [N, K] scores of the first view by K subnetworks, float16, bfloat16, float32 or float64.
        scores2: [N, K] of the second view, same shape, dtype and device.
        sigma: width of the similarity, > 0.
        temperature: τ > 0; logits are sim / τ, in (0, 1/τ].
        weights: two [N, K] or one [2N, K], floating point: of each view over the subnetworks; rows are taken to be
            not negative and to sum to 1, which is not checked. None: the hard winner.
        group: process group whose ranks each hold N of the W·N pairs. Every rank returns the global mean; its
            gradient is that of the global mean TIMES W, so that averaging gradients over the ranks gives what one
            process would find for the whole batch. Hard winners cost an all-reduce of K counts, forward only; soft
            ones gather the weights, and scores too if the weights need a gradient. The gradient from above must be
            the same on every rank.
        backend: "tiled" and "triton" never hold an array of 2N x 2N; "reference" does, in plain operations.

    Returns:
        Scalar, float64 for float64 scores and float32 otherwise, autocast or not. Gradients have the dtype of their
        input. A second derivative exists only for the reference without a group.

    Raises:
        ValueError: shapes, dtypes or devices that differ or do not fit, a temperature or sigma that is not positive
            and finite, an unknown backend, a group without this process, or ranks whose batches differ.
    """
    pair = weights.tensor_split(2) if isinstance(weights, Tensor) else weights
    _check(scores1, scores2, sigma, temperature, pair)
    chosen = choose_backend(backend, scores1, scores2, *(pair or ()))
    group = group_or_none(group)
    if group is not None:
        check_same_on_ranks(scores1, group)
    with torch.autocast(scores1.device.type, enabled=False):
        if chosen == "reference":
            return _reference(scores1, scores2, sigma, temperature, pair, group)
        if pair is None:
            loss: Tensor = _HardWinner.apply(scores1, scores2, sigma, temperature, group, chosen)
            return loss
        # m_i - <w_j, s_i> = <w_j, m_i - s_i> + m_i (1 - sum w_j): nothing is lost where scores are large and close.
        dtype = torch.float64 if scores1.dtype == torch.float64 else torch.float32
        scores, choices = torch.cat([scores1, scores2]).to(dtype), torch.cat(pair).to(dtype)
        highest = scores.gather(1, scores.argmax(1, keepdim=True))
        costs = torch.cat([highest - scores, highest], 1)
        choices = torch.cat([choices, 1 - choices.sum(1, keepdim=True)], 1)
        return _SoftWinner.apply(costs, choices, sigma, temperature, group, chosen)


def _reference(
    scores1: Tensor,
    scores2: Tensor,
    sigma: float,
    temperature: float,
    weights: tuple[Tensor, ...] | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    dtype = torch.float64 if scores1.dtype == torch.float64 else torch.float32

    def both_views(first: Tensor, second: Tensor) -> Tensor:
        views = [view.to(dtype) for view in (first, second)]
        return torch.cat(views if group is None else [gather_rows_with_gradient(view, group) for view in views])

    scores = both_views(scores1, scores2)
    winner = scores.argmax(1)
    of_winners = scores[:, winner] if weights is None else scores @ both_views(*weights).T
    divergence = scores.gather(1, winner[:, None]) - of_winners
    logits = (-divergence / (2 * sigma**2)).exp() / temperature
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -math.inf)
    positive = torch.arange(len(scores), device=scores.device).roll(len(scores) // 2)
    return F.cross_entropy(logits, positive)


class _HardWinner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores1: Tensor,
        scores2: Tensor,
        sigma: float,
        temperature: float,
        group: dist.ProcessGroup | None,
        backend: str,
    ) -> Tensor:
        parts = _implementation(backend)
        scores = torch.cat([scores1, scores2])
        winner, counts = parts.winners(scores)
        if group is not None:
            dist.all_reduce(counts, group=group)
        losses = parts.hard_losses(scores, winner, counts, sigma, temperature)
        ctx.save_for_backward(scores, winner, counts)
        ctx.sigma, ctx.temperature, ctx.backend = sigma, temperature, backend
        return _global_mean(losses, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scores, winner, counts = ctx.saved_tensors
        parts = _implementation(ctx.backend)
        with torch.autocast(scores.device.type, enabled=False):
            # One rank's 2N rows, not the global count: that is the factor W promised above.
            factor = upstream / len(scores)
            gradient = parts.hard_gradient(scores, winner, counts, ctx.sigma, ctx.temperature, factor)
        return *gradient.chunk(2), None, None, None, None


class _SoftWinner(torch.autograd.Function):
    """The loss of divergences D_ij = <costs_i, choices_j>, both [2N, K + 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        costs: Tensor,
        choices: Tensor,
        sigma: float,
        temperature: float,
        group: dist.ProcessGroup | None,
        backend: str,
    ) -> Tensor:
        parts = _implementation(backend)
        scales = (1 / (2 * sigma**2), 1 / temperature)
        ctx.columns = costs.shape[1]
        costs, choices = parts.prepare(costs), parts.prepare(choices)
        start = 0 if group is None else len(costs) * dist.get_rank(group)
        all_choices = choices if group is None else gather_rows(choices, group)
        exponent = (costs * choices.roll(len(costs) // 2, 0)).sum(1).mul_(-scales[0])
        positive = exponent.expm1().mul_(scales[1])
        margin = parts.soft_margins(costs, all_choices, positive, start, scales)
        losses = torch.logaddexp(margin, positive - positive)  # 0, or NaN, which a single pair would lose

        # Of each anchor: its positive's logit, and the log of the sum of all over that.
        sums, all_costs = torch.stack([positive, losses], 1), costs
        if group is not None and ctx.needs_input_grad[1]:
            sums, all_costs = gather_rows(sums, group), gather_rows(costs, group)
        # -dL_i/dD of the positive but for scales: what the anchor lacks of certainty.
        lack = margin.sigmoid().mul_(exponent.exp_())
        ctx.save_for_backward(costs, choices, all_costs, all_choices, sums, lack)
        ctx.start, ctx.scales, ctx.backend = start, scales, backend
        return _global_mean(losses, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        costs, choices, all_costs, all_choices, sums, lack = ctx.saved_tensors
        parts = _implementation(ctx.backend)
        rows, pairs = len(costs), len(costs) // 2
        own_sums = sums[ctx.start : ctx.start + rows] if len(sums) > rows else sums
        factor = upstream * (ctx.scales[0] * ctx.scales[1] / rows)
        of_costs = of_choices = None
        with torch.autocast(costs.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_costs = parts.soft_pull(costs, all_choices, own_sums, ctx.start, ctx.scales, of_rows=True)
                of_costs.sub_(lack[:, None] * choices.roll(pairs, 0)).mul_(-factor)
            if ctx.needs_input_grad[1]:
                of_choices = parts.soft_pull(choices, all_costs, sums, ctx.start, ctx.scales, of_rows=False)
                of_choices.sub_((lack[:, None] * costs).roll(pairs, 0)).mul_(-factor)
            gradients = [
                None if gradient is None else gradient[:, : ctx.columns] for gradient in (of_costs, of_choices)
            ]
        return *gradients, None, None, None, None


def _global_mean(losses: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    loss = losses.mean()
    if group is not None:
        dist.all_reduce(loss, group=group)
        loss /= dist.get_world_size(group)
    return loss


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from kernels.fused import bregman as fused

        return fused
    return bregman_tiled


def _check(
    scores1: Tensor, scores2: Tensor, sigma: float, temperature: float, weights: tuple[Tensor, ...] | None
) -> None:
    for name, scores in (("scores1", scores1), ("scores2", scores2)):
        if scores.dim() != 2 or 0 in scores.shape:
            raise ValueError(f"{name} has shape {list(scores.shape)}, expected [N, K] with N >= 1 and K >= 1")
        if not scores.is_floating_point():
            raise ValueError(f"{name} has dtype {scores.dtype}, expected a floating-point dtype")
    for what in ("shape", "dtype", "device"):
        first, second = getattr(scores1, what), getattr(scores2, what)
        if first != second:
            raise ValueError(
                f"scores1 and scores2 are two views of one batch, but their {what}s are {first} and {second}"
            )
    for name, value, usual in (("temperature", temperature, "0.1 to 0.5"), ("sigma", sigma, "0.9")):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected a finite number above 0 ({usual} is usual)")
    if weights is None:
        return
    if len(weights) != 2 or any(weight.shape != scores1.shape for weight in weights):
        raise ValueError(
            f"weights have shapes {[list(weight.shape) for weight in weights]}, expected those of the scores, "
            f"{list(scores1.shape)} for each of the two views"
        )
    for weight in weights:
        if not weight.is_floating_point() or weight.device != scores1.device:
            raise ValueError(
                f"weights are {weight.dtype} on {weight.device}, expected a floating-point dtype on {scores1.device}"
            )
