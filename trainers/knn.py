"""The weighted nearest-neighbour classifier of Wu et al. (arXiv:1805.01978), for several k and temperatures at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import nearest

BANK_BYTES = 2**30  # of the bank on the device at a time
VOTES_AT_A_TIME = 2**24  # of all settings and classes: 64 MB

Setting = tuple[int, float]  # k, temperature


@torch.no_grad()
def knn_votes(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, settings: Sequence[Setting]
) -> dict[Setting, Tensor]:
    """Class votes [M, classes] of each (k, temperature), from one search.

    The k bank rows with the largest cosine similarity vote for their label [L] with weight exp(cosine/temperature).
    A k beyond the bank's size takes the whole bank.
    """
    cosine, places = search(queries, bank, max(k for k, _ in settings))
    return _votes(cosine, bank_labels.to(places.device)[places], classes, settings)


@torch.no_grad()
def knn_rankings(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    classes: int,
    settings: Sequence[Setting],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> dict[Setting, Tensor]:
    """The up to five classes with most votes, most first, [M, 5] of each (k, temperature).

    Queries [M, d] and bank [L, d] may lie on the host, whatever the device: the bank is read a gigabyte at a time, and
    no array of M x L is made. With a group each rank classifies its share of the queries; all return all.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    share = slice(len(queries) * rank // world, len(queries) * (rank + 1) // world)
    count = min(5, classes)
    found = torch.zeros(len(settings), len(queries), count, dtype=torch.int64, device=device)
    mine = queries[share].to(device)
    if len(mine):
        cosine, places = search(mine, bank, max(k for k, _ in settings))
        labels = bank_labels.to(device)[places]
        step = max(1, VOTES_AT_A_TIME // (classes * len(settings)))
        for first in range(0, len(mine), step):
            part = slice(first, first + step)
            votes = _votes(cosine[part], labels[part], classes, settings)
            rows = slice(share.start + first, share.start + first + len(cosine[part]))
            for row, setting in enumerate(settings):
                found[row, rows] = votes[setting].topk(count, dim=1).indices
    if group is not None:
        dist.all_reduce(found, group=group)
    return dict(zip(settings, found, strict=True))


def search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest cosines [M, k] and their places in the bank [L, d], on the device of the queries [M, d].

    k beyond L is L. The bank comes to the device `BANK_BYTES` at a time.
    """
    k, queries = min(k, len(bank)), F.normalize(queries, dim=1)
    rows = max(1, BANK_BYTES // (bank.shape[1] * bank.element_size()))
    best, places = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(bank), rows):
        part = F.normalize(bank[first : first + rows].to(queries.device), dim=1)
        cosine, found = nearest(queries, part, k=min(k, len(part)))
        best, places = torch.cat([best, cosine], 1), torch.cat([places, found + first], 1)
        if best.shape[1] > k:
            best, kept = best.topk(k, dim=1)
            places = places.gather(1, kept)
    return best, places


def _votes(cosine: Tensor, labels: Tensor, classes: int, settings: Sequence[Setting]) -> dict[Setting, Tensor]:
    """Of cosines [M, k], largest first, and the labels [M, k] of those rows."""
    votes = {}
    for k, temperature in settings:
        weights = torch.exp((cosine[:, :k] - cosine[:, :1]) / temperature)  # each row's shift changes no vote
        empty = torch.zeros(len(cosine), classes, dtype=weights.dtype, device=weights.device)
        votes[k, temperature] = empty.scatter_add_(1, labels[:, :k], weights)
    return votes
