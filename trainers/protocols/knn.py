"""Weighted k-nearest-neighbour classification, several k and temperatures in one search."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from trainers.knn import knn_rankings
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import ranked_accuracy


class Settings(ClassificationSettings):
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20, 100, 200), min_length=1)
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07, 0.1), min_length=1)


def score(job: Job[Settings]) -> Result:
    """k and temperature by the held-out part, or the first of the lists without one."""
    train, holdout, test = job.splits()
    subsets = labelled(job, train)
    grid = [(k, t) for k in job.settings.k for t in job.settings.temperature]
    bank, queries = job.stored_features(train), job.stored_features(test)
    held = None if holdout is None else job.stored_features(holdout)
    classify = partial(knn_rankings, classes=train.num_classes, settings=grid, device=job.device, group=job.group)
    runs = []
    for chosen in subsets:
        rows, labels = (bank, train.labels) if len(chosen) == len(train) else (bank[chosen], train.labels[chosen])
        held_out: dict[tuple[int, float], float] = {}
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
        f"weighted kNN on L2-normalised features (arXiv:1805.01978); bank: {runs[0].labels} labelled images of"
        f" {train.name}/train; k and T chosen by {by}; all {len(test)} test images"
    )
    return classification_result(job, runs, test, description)
