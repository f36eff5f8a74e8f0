"""The protocols behind ``evaluate.py knn`` and ``linear``: what is fitted on what, chosen where, scored how.

Settings are chosen on the held-out part of the training images; the test split is scored once, whole.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.subsets import label_subset, save_subset
from trainers.encoders import EncoderConfig
from trainers.features import FrozenEncoder, features_of
from trainers.knn import knn_votes, top_accuracy
from trainers.linear import search_logistic


class Settings(BaseModel):
    """What ``key=value`` can say. ``data.*`` and ``encoder.*`` are those of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: str = "all"  # or 10%, 1%, 10-per-class
    seeds: int = Field(3, ge=1)  # label subsets to average over; one is enough where all labels are used
    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100, 200)  # knn
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = (0.07, 0.1)  # knn
    seed: int = 0  # of a random encoder
    size: int | None = Field(None, ge=1)  # pixels, for baselines; a trained encoder knows its own
    data: dict[str, Any] = {}
    encoder: EncoderConfig = EncoderConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class Job:
    encoder: FrozenEncoder
    settings: Settings
    data: DataConfig
    device: torch.device

    def split(self, name: Literal["train", "holdout", "test"]) -> tuple[Source, torch.Tensor, torch.Tensor]:
        """A split with its features [N, d] and labels [N]."""
        source = open_source(self.data, name)
        if source.multi_label:
            raise DataError(f"{source.name} has several labels an image; kNN and linear evaluation need exactly one")
        return source, features_of(self.encoder, source, self.device), source.labels.to(self.device)

    def labelled(self, train: Source, seed: int) -> torch.Tensor:
        """Positions of the images whose labels may be used, kept as an index file."""
        budget = self.settings.labels
        chosen = label_subset(train, budget, seed)
        if budget != "all":
            path = self.encoder.folder / "labels" / f"{train.name}-{budget.replace('%', 'pct')}-seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_subset(path, train, chosen, budget=budget, seed=seed)
        return chosen.to(self.device)


def score_knn(job: Job) -> dict[str, Any]:
    train, bank, bank_labels = job.split("train")
    _, holdout, holdout_labels = job.split("holdout")
    test_source, test, test_labels = job.split("test")
    grid = [(k, t) for k in job.settings.k for t in job.settings.temperature]
    classes = train.num_classes
    seeds = _label_seeds(job.settings)
    runs = []
    for seed in seeds:
        chosen = job.labelled(train, seed)
        votes = {
            name: knn_votes(queries, bank[chosen], bank_labels[chosen], classes, grid)
            for name, queries in (("holdout", holdout), ("test", test))
        }
        held_out = {s: top_accuracy(v, holdout_labels) for s, v in votes["holdout"].items()}
        best = max(grid, key=lambda s: held_out[s]) if len(holdout) else grid[0]  # ties: the first of the grid
        runs.append(
            {
                "k": best[0],
                "temperature": best[1],
                "top1": top_accuracy(votes["test"][best], test_labels),
                "top5": _top5(votes["test"][best], test_labels, classes),
                "labels": len(chosen),
                "grid": {
                    f"k={k} T={t:g}": {"holdout": held_out[k, t], "test": top_accuracy(v, test_labels)}
                    for (k, t), v in votes["test"].items()
                },
            }
        )
    chosen_by = "held-out part" if len(holdout) else "first of the list (no held-out part)"
    return _summary(
        job,
        protocol="knn",
        runs=runs,
        n_test=len(test),
        description=(
            f"weighted kNN on L2-normalised features (arXiv:1805.01978); bank: {runs[0]['labels']} labelled images of"
            f" {train.name}/train; k, T by the {chosen_by} ({len(holdout)} images); all {len(test)} test images"
            f" of {test_source.name}"
        ),
    )


def score_linear(job: Job) -> dict[str, Any]:
    train, features, labels = job.split("train")
    holdout_source, holdout, holdout_labels = job.split("holdout")
    test_source, test, test_labels = job.split("test")
    if len(holdout) == 0:
        raise DataError(f"{holdout_source.name} has no held-out part to choose the L2 strength on; set data.holdout")
    classes = train.num_classes
    runs = []
    for seed in _label_seeds(job.settings):
        chosen = job.labelled(train, seed)
        search = search_logistic(features[chosen], labels[chosen], holdout, holdout_labels, classes)
        logits = search.best.logits(test)
        runs.append(
            {
                "l2": search.best.l2,
                "l2_at_edge_of_grid": search.at_edge,
                "holdout_top1": search.holdout_top1[search.best.l2],
                "top1": top_accuracy(logits, test_labels),
                "top5": _top5(logits, test_labels, classes),
                "labels": len(chosen),
            }
        )
    return _summary(
        job,
        protocol="linear",
        runs=runs,
        n_test=len(test),
        description=(
            f"logistic regression by full-batch L-BFGS on frozen, standardised features; {runs[0]['labels']} labelled"
            f" images of {train.name}/train; L2 by the held-out part ({len(holdout)} images); all {len(test)} test"
            f" images of {test_source.name}, no augmentation"
        ),
    )


def _label_seeds(settings: Settings) -> range:
    return range(1 if settings.labels == "all" else settings.seeds)


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
