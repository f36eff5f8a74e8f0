"""Online k-means of projections, as KMCLR needs it: centres that follow the encoder, and forget."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import kmeans_assign
from kernels.ranks import gather_rows, group_or_none

LEAST_SHARE = 0.1  # of an even share of the rows: who gets less lately is dead
ROWS_REMEMBERED = 10  # lately: while each of equally used centres gets as many


class Prototypes(nn.Module):
    """K centres, updated by one batch at a time; everything is in buffers, the same on every rank.

    "cosine" is spherical k-means: rows count with norm 1, a row belongs to the centre of largest cosine. "euclidean"
    takes rows as they come. A centre is the mean of its rows since it was seeded ("mean", as in scikit-learn's
    MiniBatchKMeans: it learns ever more slowly), or moves towards the batch's mean of its rows by a constant share
    (``decay``). The last K rows of all ranks are kept. They are the first centres, all centres are replaced by them
    every ``reseed_every`` updates, and a dead centre is replaced by one of them: by which, follows from the number of
    the update, as rows come in random order anyway.

    Args:
        count: K. Rows of a batch count from the update after the first K rows on.
        width: D.
        classes: how many labels there are, for `same_class`; 0: none are known.
        batch_size: rows of an update, of all ranks.
        metric: "cosine" or "euclidean".
        decay: None for "mean"; else 0 <= decay < 1, c ← decay·c + (1 − decay)·mean for centres that got rows.
        reseed_every: updates; 0: never.
        revive: whether dead centres are replaced.
        uniform: begin at once with centres drawn from U(0, 1), as the seed of KMCLR does.
    """

    centres: Tensor  # [K, D]; with "cosine" the mean of unit rows, of norm <= 1
    counts: Tensor  # [K] int64, rows since the centre was seeded, that row among them
    usage: Tensor  # [K] share of the rows that each centre got lately
    classes: Tensor  # [K, C] share of each label among a centre's rows, moved as the centre
    recent: Tensor  # [K, D] the last rows, oldest first
    recent_labels: Tensor  # [K] int64, -1 where unknown
    clock: Tensor  # [2] int64: updates, and rows that came with them

    def __init__(
        self,
        count: int,
        width: int,
        *,
        classes: int,
        batch_size: int,
        metric: str = "cosine",
        decay: float | None = None,
        reseed_every: int = 0,
        revive: bool = True,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        self.metric, self.decay, self.uniform = metric, decay, uniform
        self.reseed_every, self.revive = reseed_every, revive
        self.forgotten = min(1.0, batch_size / (ROWS_REMEMBERED * count))  # share of `usage`, in an update
        self.register_buffer("centres", torch.rand(count, width) if uniform else torch.zeros(count, width))
        self.register_buffer("counts", torch.full((count,), int(uniform)))
        self.register_buffer("usage", torch.full((count,), 1 / count))
        self.register_buffer("classes", torch.zeros(count, classes))
        self.register_buffer("recent", torch.zeros(count, width))
        self.register_buffer("recent_labels", torch.full((count,), -1))
        self.register_buffer("clock", torch.zeros(2, dtype=torch.int64))
        self._updates, self._rows = 0, 0  # what `clock` holds on the device, known here too

    @property
    def is_ready(self) -> bool:
        """Whether there are centres."""
        return self.uniform or self._rows >= len(self.centres)

    @torch.no_grad()
    def assign(self, rows: Tensor) -> Tensor:
        """rows [M, D] -> [M] int64, the centre that each belongs to."""
        return kmeans_assign(self._counted(rows), self.centres, metric=self.metric)[0]

    @torch.no_grad()
    def update(self, rows: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Take in a batch: rows [N, D] and labels [N] int64 (-1: unknown) of each rank, as many on each."""
        rows, group, was_ready = self._counted(rows), group_or_none(group), self.is_ready
        if was_ready:
            ids, sums, counts = kmeans_assign(rows, self.centres, metric=self.metric, group=group)
            if group is not None:
                ids, labels = gather_rows(torch.stack([ids, labels], 1), group).unbind(1)
            self._move(sums, counts, self._histogram(ids, labels))
        elif group is not None:
            labels = gather_rows(labels, group)
        if group is not None:
            rows = gather_rows(rows, group)
        self._remember(rows, labels)
        if self._rows < len(self.centres):
            return
        if not was_ready or (self.reseed_every and self._updates % self.reseed_every == 0):
            self._seed(torch.ones_like(self.counts, dtype=torch.bool), 0)
        elif self.revive:
            self._seed(self.is_dead, self._updates)

    @property
    def is_dead(self) -> Tensor:
        """[K] bool."""
        return self.usage < LEAST_SHARE / len(self.usage)

    def occupancy(self) -> Tensor:
        """Share of the centres that are not dead and got rows since they were seeded."""
        return ((self.counts > 1) & ~self.is_dead).float().mean()

    @torch.no_grad()
    def entropy(self, ids: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Of the assignments [M] of all ranks: 1 if spread as evenly as so many can be, 0 if all are the same."""
        counts = torch.zeros_like(self.usage).index_add_(0, ids, self.usage.new_ones(len(ids)))
        rows = len(ids)
        if (group := group_or_none(group)) is not None:
            dist.all_reduce(counts, group=group)
            rows *= dist.get_world_size(group)
        return torch.special.entr(counts / rows).sum().float() / math.log(min(len(counts), rows))

    def same_class(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For rows [M] of the centres ``ids``: the share of the centre's labelled rows that have the row's label, and
        whether that can be said, [M] bool."""
        if self.classes.shape[1] == 0:
            return torch.zeros_like(ids, dtype=self.classes.dtype), torch.zeros_like(ids, dtype=torch.bool)
        total = self.classes.sum(1)[ids]
        known = (labels >= 0) & (total > 0)
        return self.classes[ids, labels.clamp_min(0)] / total.clamp_min(1e-12), known

    def _counted(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.centres.dtype)
        return F.normalize(rows, dim=1) if self.metric == "cosine" else rows

    def _histogram(self, ids: Tensor, labels: Tensor) -> Tensor:
        """[K, C]: how many rows of each label each centre got."""
        found = torch.zeros_like(self.classes)
        if found.shape[1]:
            places = ids * found.shape[1] + labels.clamp_min(0)
            found.view(-1).index_add_(0, places, (labels >= 0).to(found.dtype))
        return found

    def _move(self, sums: Tensor, counts: Tensor, histogram: Tensor) -> None:
        got = counts[:, None].to(self.centres.dtype)
        step = got / (self.counts[:, None] + got)
        if self.decay is not None:
            step = (1 - self.decay) * (got > 0).to(got.dtype)
        for buffer, total in ((self.centres, sums), (self.classes, histogram)):
            buffer += step * (total / got.clamp_min(1) - buffer)
        self.counts += counts
        self.usage.lerp_(got[:, 0] / got.sum(), self.forgotten)

    def _remember(self, rows: Tensor, labels: Tensor) -> None:
        count = len(self.recent)
        self.recent.copy_(torch.cat([self.recent, rows])[-count:])
        self.recent_labels.copy_(torch.cat([self.recent_labels, labels])[-count:])
        self._updates += 1
        self._rows += len(rows)
        self.clock[0].add_(1)
        self.clock[1].add_(len(rows))

    def _seed(self, chosen: Tensor, shift: int) -> None:
        """Each chosen centre [K] bool becomes one of the last rows."""
        labels = self.recent_labels.roll(shift)
        one_hot = (labels[:, None] == torch.arange(self.classes.shape[1], device=labels.device)).to(self.classes.dtype)
        self.centres.copy_(torch.where(chosen[:, None], self.recent.roll(shift, 0), self.centres))
        self.classes.copy_(torch.where(chosen[:, None], one_hot, self.classes))
        self.counts.masked_fill_(chosen, 1)
        self.usage.masked_fill_(chosen, 1 / len(self.usage))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updates, self._rows = self.clock.tolist()
