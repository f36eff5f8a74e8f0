"""Which subnetworks win which views, and what a loss can make of it; the contrastive one is ``kernels.bregman_loss``.

K subnetworks score a view; the highest score m_i of view i names its winner. D(i || j) = m_i - s_i,winner(j) is a
divergence: zero if i's winner is j's, else what i loses by taking j's. A soft winner is a row of K weights.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.ranks import gather_rows_with_gradient, group_or_none, mean_over_ranks
from pipelines.draw import uniforms


def usage_divergence(scores: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """KL(uniform || p), p the mean of softmax(scores / temperature) over the rows [2N, K] of all ranks: 0 if all
    subnetworks are used alike.

    It leads out of the state in which one subnetwork c wins every row, where the Bregman loss has no gradient: there
    its derivative by all scores of c together is at least (min_i p_ic - 1/K) / temperature, and c's share of a row
    that it wins is above 1/K. (An entropy's gradient would vanish with the shares of the others.) Everything is
    computed as logarithms, so that shares may be as small as they like. Gradient times ranks, as in ``kernels``.
    """
    group = group_or_none(group)
    sums = F.log_softmax(scores / temperature, dim=1).logsumexp(0)
    rows = len(scores)
    if group is not None:
        sums = gather_rows_with_gradient(sums[None], group).logsumexp(0)
        rows *= dist.get_world_size(group)
    return math.log(rows) - math.log(scores.shape[1]) - sums.mean()


def margin_loss(
    scores1: Tensor,
    scores2: Tensor,
    step: int,
    *,
    seed: int = 0,
    margin: float = 1.0,
    weights: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over the 2N anchors of D(positive) + max(0, margin - D(negative))², one drawn negative an anchor.

    Args:
        scores1: [N, K] of the first view; row i of ``scores2`` [N, K] is its positive.
        step: of training, from 0; the negatives follow from it, the run's ``seed`` and the anchors' places in the
            whole batch alone.
        weights: soft winners [N, K] of both views, rows that sum to 1; None: hard ones.
        group: as in ``kernels``: the mean is over all ranks, the gradient multiplied by their number.
    """
    group = group_or_none(group)
    pairs, rank, ranks = len(scores1), 0, 1
    if group is not None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    scores = torch.cat([scores1, scores2])
    winner = scores.argmax(1, keepdim=True)
    regrets = scores.gather(1, winner) - scores  # of each anchor, were this subnetwork to win it
    choices = torch.zeros_like(scores).scatter_(1, winner, 1) if weights is None else torch.cat(weights)
    positive = (choices.roll(pairs, 0) * regrets).sum(1)

    everyone = choices
    if group is not None:  # from [rank, view, image] to [view, rank, image]
        everyone = gather_rows_with_gradient(choices, group).unflatten(0, (ranks, 2, pairs)).transpose(0, 1)
        everyone = everyone.flatten(0, 2)
    images = torch.arange(rank * pairs, (rank + 1) * pairs, device=scores.device)
    anchors = torch.cat([images, images + ranks * pairs])
    negative = (everyone[draw_negatives(step, anchors, ranks * pairs, seed)] * regrets).sum(1)
    return mean_over_ranks((positive + (margin - negative).clamp_min(0).square()).mean(), group)


def draw_negatives(step: int, anchors: Tensor, pairs: int, seed: int = 0) -> Tensor:
    """One of the 2N - 2 other rows that are not an anchor's positive, for each of the anchors [n] int64.

    Row i and row i + N of the whole batch of N ``pairs`` are each other's positives. A pure function of seed, step
    and row.
    """
    draws = uniforms(seed, step, anchors, 0, 1)[:, 0]
    distance = 1 + (draws * (2 * pairs - 2)).floor().to(torch.int64)
    distance += distance >= pairs  # the positive is `pairs` rows away, the anchor itself 0
    return (anchors + distance) % (2 * pairs)


@torch.no_grad()
def winner_statistics(scores1: Tensor, scores2: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Of the hard winners of all ranks' views, scores [N, K] each: how many subnetworks won at all, the entropy of
    their shares in nats, and the mean divergence of positives and of negatives. O(N·K)."""
    group = group_or_none(group)
    scores = torch.cat([scores1, scores2])
    winner = scores.argmax(1, keepdim=True)
    counts = torch.zeros_like(scores[0]).scatter_add_(0, winner[:, 0], torch.ones_like(scores[:, 0]))
    if group is not None:
        dist.all_reduce(counts, group=group)
    rows = counts.sum()
    share = counts / rows
    regrets = scores.gather(1, winner) - scores
    positive = regrets.gather(1, winner.roll(len(scores1), 0))[:, 0]
    negative = (regrets @ counts - positive) / (rows - 2)  # all columns of a row but itself, which is 0, and that one
    return {
        "active_subnetworks": (counts > 0).to(counts.dtype).sum(),
        "winner_entropy": -torch.xlogy(share, share).sum(),
        "positive_divergence": mean_over_ranks(positive.mean(), group),
        "negative_divergence": mean_over_ranks(negative.mean(), group),
    }
