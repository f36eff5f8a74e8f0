"""How a run is doing: held-out kNN, an online linear probe, and the signs of collapse.

Everything here looks at the training images and their held-out part. The test split is ``evaluate.py``'s alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.config import LoaderConfig, Section
from pipelines.plain_views import plain_batches
from pipelines.sources import Source
from trainers.encoders import feature_width
from trainers.engine import Ranks
from trainers.fitting import fitted_state, load_fitted
from trainers.knn import knn_votes
from trainers.mine import Mine
from trainers.scores import top_accuracy
from trainers.step import StepResult

KNN_SETTINGS = ((20, 0.07), (200, 0.1))


class MonitorConfig(Section):
    every_epochs: float = Field(1.0, gt=0)
    images: int = Field(10_000, ge=1)  # at most this many held-out images, and as many to search among
    probe_lr: float = Field(1e-3, gt=0)  # Adam, for the online linear probe
    mine: bool = False  # estimate the mutual information of the features of two views, trained in every step


class Probe(nn.Module):
    """A linear classifier trained beside the encoder on its detached features: what they are worth so far."""

    def __init__(self, features: int, classes: int, lr: float, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes).to(device)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr, fused=True)

    def fit(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """One step on features [V, N, d] and labels [N] (-1: unlabelled, ignored); returns the loss.

        The loss is the mean over all labelled rows of all ranks, however unevenly they are spread.
        """
        rows = features.flatten(0, 1).float()
        targets = labels.repeat(features.shape[0])
        count = (targets >= 0).sum().float()
        if group is not None:
            dist.all_reduce(count, group=group)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.linear(rows), targets, ignore_index=-1, reduction="sum") / count.clamp_min(1)
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for tensor in [loss, *(p.grad for p in self.linear.parameters() if p.grad is not None)]:
                dist.all_reduce(tensor, group=group)
        self.optimizer.step()
        return loss

    def state(self) -> dict[str, Tensor]:
        return fitted_state(self.linear, self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_fitted(self.linear, self.optimizer, tensors)


class Monitor:
    """A probe (and MINE) fitted in every step; kNN, probe and collapse figures on the held-out part now and then."""

    def __init__(
        self,
        config: MonitorConfig,
        encoder: nn.Module,
        train: Source | None,
        holdout: Source | None,
        *,
        size: int,
        batch_size: int,
        ranks: Ranks,
        loading: LoaderConfig | None = None,
    ) -> None:
        """``train``: the labelled images to search among; ``holdout``: those to classify; ``size`` in pixels.

        Either may be missing. The probe needs labels of one class an image, kNN and accuracy the held-out part too.
        """
        self.config, self.encoder, self.ranks = config, encoder, ranks
        self.size, self.batch_size, self.loading = size, batch_size, loading
        self.bank = _spread(train, config.images)
        self.holdout = _spread(holdout, config.images)
        self.probe: Probe | None = None
        if train is not None and not train.multi_label and train.num_classes > 1:
            self.probe = Probe(feature_width(encoder), train.num_classes, config.probe_lr, ranks.device)
        self.mine = Mine(feature_width(encoder), ranks.device) if config.mine else None

    def observe(self, result: StepResult) -> dict[str, Tensor]:
        """Called after each optimizer step; returns scalars to log with the method's."""
        scalars, group, features = {}, self.ranks.group, result.embeddings["features"]
        if self.probe is not None:
            scalars["probe_loss"] = self.probe.fit(features, result.batch.labels, group)
        if self.mine is not None:
            scalars["mine/mutual_information"] = self.mine.fit(features[0], features[1], group)
        return scalars

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is trained here, by file name for a checkpoint; the same on all ranks."""
        trained = {"probe": self.probe, "mine": self.mine}
        return {name: part.state() for name, part in trained.items() if part is not None}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of ``state``; other entries are passed over."""
        for name, part in (("probe", self.probe), ("mine", self.mine)):
            if part is not None:
                part.load(state[name])

    @torch.no_grad()
    def evaluate(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Scores on the held-out part; every rank computes all of it, and so agrees without a word.

        ``stopped`` is asked between batches, on all ranks alike; once it says so there are no scores: None.
        """
        if self.holdout is None:
            return {}
        try:
            return self._scores(self.holdout, stopped)
        except _StoppedError:
            return None

    def _scores(self, holdout: Source, stopped: Callable[[], bool]) -> dict[str, float]:
        held_out = self._features(holdout, stopped)
        scores = {
            "holdout/feature_std": feature_std(held_out),
            "holdout/effective_rank": effective_rank(held_out),
        }
        if self.probe is not None and self.bank is not None:
            labels = holdout.labels.to(held_out.device)
            bank = self._features(self.bank, stopped)
            bank_labels = self.bank.labels.to(held_out.device)
            votes = knn_votes(held_out, bank, bank_labels, self.bank.num_classes, KNN_SETTINGS)
            for (k, temperature), vote in votes.items():
                scores[f"holdout/knn_k{k}_t{temperature:g}"] = top_accuracy(vote, labels)
            scores["holdout/probe"] = top_accuracy(self.probe.linear(held_out), labels)
        return scores

    def _features(self, source: Source, stopped: Callable[[], bool]) -> Tensor:
        training = self.encoder.training
        self.encoder.eval()
        dtype, features = next(self.encoder.parameters()).dtype, []
        try:
            batches = plain_batches(source, self.size, self.batch_size, self.ranks.device, self.loading)
            with closing(batches):
                for images, _ in batches:
                    if stopped():
                        raise _StoppedError
                    features.append(self.encoder(images.to(dtype)).float())
        finally:
            self.encoder.train(training)
        return torch.cat(features)


class _StoppedError(Exception):
    """Left between two batches."""


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the std of the L2-normalised features [N, d], times √d: 1 if they fill the sphere
    evenly, 0 if collapsed to a point (Chen & He, arXiv:2011.10566)."""
    unit = F.normalize(features, dim=1)
    return (unit.std(dim=0).mean() * features.shape[1] ** 0.5).item()


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of [N, d] features, each over their sum (RankMe, arXiv:2210.02885)."""
    share = torch.linalg.svdvals(features.double())
    share = share / share.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.exp(-(share * share.clamp_min(1e-300).log()).sum()).item()


def _spread(source: Source | None, count: int) -> Source | None:
    """At most ``count`` images, evenly spaced over the source."""
    if source is None or len(source) <= count:
        return source
    total = len(source)
    return source.select((torch.arange(count) * total) // count)
