"""Nearest neighbours by the functional Bregman divergence of BeCLR (arXiv:2109.07455), exactly and without a search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.knn import Setting


@torch.no_grad()
def bregman_votes(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, settings: Sequence[Setting], *, sigma: float
) -> dict[Setting, Tensor]:
    """Class votes [M, classes] of each (k, temperature).

    With scores s of K subnetworks, D(q || b) = max_j s_q[j] − s_q[argmax_j s_b[j]]: of a bank row only its winner
    counts.
    So the bank is a table of how many rows of each class each subnetwork won, and the rows of one winner are equally
    far. The k nearest vote with exp(similarity/temperature), similarity = exp(−D / 2σ²); where only some of the
    equally far fit into k, each of them counts by that share, which is the mean over all ways to choose.

    Args:
        queries: scores [M, K].
        bank: scores [L, K], labels [L].
    """
    count = queries.shape[1]
    winners = bank.argmax(1)
    places = winners * classes + bank_labels.to(winners.device)
    table = torch.bincount(places, minlength=count * classes).view(count, classes).to(queries.dtype)
    rows = table.sum(1)
    ordered, order = queries.sort(dim=1, descending=True)
    similarity = torch.exp((ordered - ordered[:, :1]) / (2 * sigma**2))
    sizes = rows[order]
    before = sizes.cumsum(1) - sizes
    votes = {}
    for k, temperature in settings:
        share = ((k - before) / sizes.clamp_min(1)).clamp(0, 1)
        weights = share * torch.exp((similarity - 1) / temperature)
        by_winner = torch.zeros_like(queries).scatter_(1, order, weights)
        votes[k, temperature] = by_winner @ table
    return votes
