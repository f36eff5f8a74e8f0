"""The protocols behind ``evaluate.py knn`` and ``linear``: what is fitted on what, chosen where, scored how.

Settings are chosen on the held-out part of the training images, never on test, which is always scored whole.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from pipelines.config import Section
from pipelines.sources import DataConfig, DataError, Source, describe, open_source
from pipelines.subsets import label_subset, load_subset, save_subset
from trainers.encoders import EncoderConfig
from trainers.features import FrozenEncoder, features_of
from trainers.knn import knn_votes, top_accuracy
from trainers.linear import search_logistic


class Settings(Section):
    """What ``key=value`` can say. ``data.*`` and ``encoder.*`` are those of a recipe."""

    labels: str = "all"  # or 10%, 1%, 10-per-class, or an index file
    seeds: int = Field(3, ge=1)  # label subsets to average over; one is enough where all labels are used
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20, 100, 200), min_length=1)  # knn
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07, 0.1), min_length=1)  # knn
    seed: int = Field(0, ge=0, lt=2**62)  # of a random encoder
    size: int | None = Field(None, ge=1, le=4096)  # pixels, for baselines; a trained encoder knows its own
    data: dict[str, Any] = Field(default={})
    encoder: EncoderConfig = EncoderConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class Job:
    encoder: FrozenEncoder
    settings: Settings
    data: DataConfig
    device: torch.device

    def splits(self) -> tuple[Source, Source | None, Source]:
        """train, holdout (if there is one) and test, opened and checked before any feature is computed."""
        train = open_source(self.data, "train")
        if train.multi_label:
            raise DataError(f"{train.name} has several labels an image; kNN and linear evaluation need exactly one")
        holdout = open_source(self.data, "holdout") if describe(self.data).counts["holdout"] else None
        return train, holdout, open_source(self.data, "test")

    def features(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, d] and labels [N] of a split."""
        return features_of(self.encoder, source, self.device, self.data), source.labels.to(self.device)

    def labelled(self, train: Source) -> list[torch.Tensor]:
        """Positions of the images whose labels may be used, once for each seed, kept as index files."""
        budget = self.settings.labels
        if budget.endswith(".json"):
            return [load_subset(Path(budget), train).to(self.device)]
        chosen = [label_subset(train, budget, seed) for seed in range(1 if budget == "all" else self.settings.seeds)]
        if budget != "all":
            folder = self.encoder.folder / "labels"
            folder.mkdir(parents=True, exist_ok=True)
            for seed, positions in enumerate(chosen):
                name = f"{train.name}-{train.fingerprint()[:8]}-{budget.replace('%', 'pct')}-seed{seed}.json"
                save_subset(folder / name, train, positions, budget=budget, seed=seed)
        return [positions.to(self.device) for positions in chosen]


def score_knn(job: Job) -> dict[str, Any]:
    """Weighted kNN: k and temperature by the held-out part, or the first of the lists without one."""
    train, holdout, test = job.splits()
    subsets = job.labelled(train)
    grid = [(k, t) for k in job.settings.k for t in job.settings.temperature]
    bank, bank_labels = job.features(train)
    held = None if holdout is None else job.features(holdout)
    test_features, test_labels = job.features(test)
    runs = []
    for chosen in subsets:
        bank_part = bank[chosen], bank_labels[chosen], train.num_classes
        held_out: dict[tuple[int, float], float] = {}
        if held is not None:
            votes = knn_votes(held[0], *bank_part, grid)
            held_out = {setting: top_accuracy(vote, held[1]) for setting, vote in votes.items()}
        best = max(grid, key=lambda setting: held_out.get(setting, 0.0))  # ties: the first of the lists
        votes = knn_votes(test_features, *bank_part, grid)
        runs.append(
            {
                "k": best[0],
                "temperature": best[1],
                "top1": top_accuracy(votes[best], test_labels),
                "top5": _top5(votes[best], test_labels, train.num_classes),
                "labels": len(chosen),
                "all_settings": {f"k={k} T={t:g}": top_accuracy(v, test_labels) for (k, t), v in votes.items()},
            }
        )
    by = f"the held-out part ({len(holdout)} images)" if holdout else "order of the lists, nothing being held out"
    description = (
        f"weighted kNN on L2-normalised features (arXiv:1805.01978); bank: {runs[0]['labels']} labelled images of"
        f" {train.name}/train; k and T chosen by {by}; all {len(test)} test images"
    )
    return _summary(job, protocol="knn", runs=runs, n_test=len(test), description=description)


def score_linear(job: Job) -> dict[str, Any]:
    """Logistic regression: L2 strength by the held-out part."""
    train, holdout, test = job.splits()
    if holdout is None:
        raise DataError(f"{train.name} has no held-out part to choose the L2 strength on; set data.holdout above 0")
    subsets = job.labelled(train)
    features, labels = job.features(train)
    holdout_features, holdout_labels = job.features(holdout)
    test_features, test_labels = job.features(test)
    runs = []
    for chosen in subsets:
        search = search_logistic(features[chosen], labels[chosen], holdout_features, holdout_labels, train.num_classes)
        logits = search.best.logits(test_features)
        runs.append(
            {
                "l2": search.best.l2,
                "l2_at_edge_of_grid": search.at_edge,
                "holdout_top1": search.holdout_top1[search.best.l2],
                "top1": top_accuracy(logits, test_labels),
                "top5": _top5(logits, test_labels, train.num_classes),
                "labels": len(chosen),
            }
        )
    description = (
        f"logistic regression by full-batch L-BFGS on frozen, standardised features; {runs[0]['labels']} labelled"
        f" images of {train.name}/train; L2 chosen by the held-out part ({len(holdout)} images); all {len(test)} test"
        " images, no augmentation"
    )
    return _summary(job, protocol="linear", runs=runs, n_test=len(test), description=description)


def _top5(scores: torch.Tensor, labels: torch.Tensor, classes: int) -> float | None:
    return top_accuracy(scores, labels, 5) if classes >= 6 else None


def _summary(job: Job, *, protocol: str, runs: list[dict[str, Any]], n_test: int, description: str) -> dict[str, Any]:
    """The record of one evaluation: means over label draws, and everything about each."""
    top1 = [run["top1"] for run in runs]
    top5 = [run["top5"] for run in runs]
    return {
        "protocol": protocol,
        "metric": "top1",
        "value": statistics.fmean(top1),
        "standard_error": statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else None,
        "top1": statistics.fmean(top1),
        "top5": None if top5[0] is None else statistics.fmean(top5),
        "n_test": n_test,
        "labels": job.settings.labels,
        "encoder": job.encoder.label,
        "data": job.data.source,
        "description": description,
        "runs": runs,
    }
