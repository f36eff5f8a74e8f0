"""Weighted k-nearest-neighbour classification, several k and temperatures in one search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainers.bregman_knn import bregman_votes
from trainers.knn import Setting, knn_rankings
from trainers.methods.beclr import Method as BeCLR
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import ranked_accuracy
from trainers.state import CheckpointError
from trainers.whole import load_method, method_config

# Queries [M, d], bank [L, d], its labels [L] -> the likeliest classes [M, 5] by setting.
Classify = Callable[[Tensor, Tensor, Tensor], dict[Setting, Tensor]]


class Settings(ClassificationSettings):
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20, 100, 200), min_length=1)
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07, 0.1), min_length=1)
    similarity: Literal["cosine", "bregman"] = "cosine"  # bregman: BeCLR's, of the scores of its subnetworks


def score(job: Job[Settings]) -> Result:
    """k and temperature by the held-out part, or the first of the lists without one."""
    train, holdout, test = job.splits()
    grid = list(dict.fromkeys((k, t) for k in job.settings.k for t in job.settings.temperature))
    classify, kind = _by_cosine(job, grid, train.num_classes)
    if job.settings.similarity == "bregman":
        classify, kind = _by_divergence(job, grid, train.num_classes)
    subsets = labelled(job, train)
    bank, queries = job.stored_features(train), job.stored_features(test)
    held = None if holdout is None else job.stored_features(holdout)
    runs = []
    for chosen in subsets:
        rows, labels = (bank, train.labels) if len(chosen) == len(train) else (bank[chosen], train.labels[chosen])
        held_out: dict[Setting, float] = {}
        if held is not None and holdout is not None:
            rankings = classify(held, rows, labels)
            held_out = {s: ranked_accuracy(r, holdout.labels, train.num_classes).top1 for s, r in rankings.items()}
        best = max(grid, key=lambda setting: held_out.get(setting, 0.0))  # ties: the first of the lists
        rankings = classify(queries, rows, labels)
        found = {s: ranked_accuracy(r, test.labels, train.num_classes) for s, r in rankings.items()}
        every = {f"k={k} T={t:g}": found[k, t].top1 for k, t in grid}
        runs.append(Run(len(chosen), {"k": best[0], "temperature": best[1]}, found[best], {"all_settings": every}))
    by = f"the held-out part ({len(holdout)} images)" if holdout else "order of the lists, nothing being held out"
    description = (
        f"weighted kNN {kind}; bank: {runs[0].labels} labelled images of {train.name}/train; k and T chosen by {by};"
        f" all {len(test)} test images"
    )
    return classification_result(job, runs, test, description)


def _by_cosine(job: Job[Settings], grid: list[Setting], classes: int) -> tuple[Classify, str]:
    classify = partial(knn_rankings, classes=classes, settings=grid, device=job.device, group=job.group)
    return classify, "on L2-normalised features (arXiv:1805.01978)"


def _by_divergence(job: Job[Settings], grid: list[Setting], classes: int) -> tuple[Classify, str]:
    """Every process does all of it: there is nothing to search."""
    if job.target is None or not job.target.is_dir():
        raise CheckpointError("similarity=bregman needs the subnetworks of a BeCLR run; name its run folder")
    method = None
    if method_config(job.target).name == "beclr":
        method = load_method(job.target, job.encoder.step).to(job.device)
    if not isinstance(method, BeCLR):
        raise CheckpointError(f"similarity=bregman needs the subnetworks of a BeCLR run, which {job.target} is not")
    sigma, count = method.config.sigma, min(5, classes)

    @torch.no_grad()
    def scores(features: Tensor) -> Tensor:
        parts = [method.subnetworks(method.projector(rows.to(job.device))) for rows in features.split(4096)]
        return torch.cat(parts)

    def classify(queries: Tensor, bank: Tensor, labels: Tensor) -> dict[Setting, Tensor]:
        votes = bregman_votes(scores(queries), scores(bank), labels, classes, grid, sigma=sigma)
        return {setting: vote.topk(count, dim=1).indices for setting, vote in votes.items()}

    return classify, f"by the Bregman divergence of BeCLR's subnetworks (arXiv:2109.07455), sigma {sigma:g}"
