"""The weighted nearest-neighbour classifier of Wu et al. (arXiv:1805.01978), for several k and temperatures at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import nearest


@torch.no_grad()
def knn_votes(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    settings: Sequence[tuple[int, float]],
) -> dict[tuple[int, float], Tensor]:
    """Class votes [M, classes] of each (k, temperature), from one search.

    The k bank rows with the largest cosine similarity vote for their label [L] with weight exp(cosine/temperature).
    A k beyond the bank's size takes the whole bank.
    """
    largest = min(max(k for k, _ in settings), len(bank))
    cosine, places = nearest(F.normalize(queries, dim=1), F.normalize(bank, dim=1), k=largest)
    labels = bank_labels[places]
    votes = {}
    for k, temperature in settings:
        weights = torch.exp((cosine[:, :k] - cosine[:, :1]) / temperature)  # each row's shift changes no vote
        empty = torch.zeros(len(queries), classes, dtype=weights.dtype, device=weights.device)
        votes[k, temperature] = empty.scatter_add_(1, labels[:, :k], weights)
    return votes
