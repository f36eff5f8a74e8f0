"""Weighted k-nearest-neighbour classification, several k and temperatures in one search."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainers.knn import knn_votes
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import accuracy, top_accuracy


class Settings(ClassificationSettings):
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20, 100, 200), min_length=1)
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07, 0.1), min_length=1)


def score(job: Job[Settings]) -> Result:
    """k and temperature by the held-out part, or the first of the lists without one."""
    train, holdout, test = job.splits()
    subsets = labelled(job, train)
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
        every = {f"k={k} T={t:g}": top_accuracy(vote, test_labels) for (k, t), vote in votes.items()}
        found = accuracy(votes[best], test_labels)
        runs.append(Run(len(chosen), {"k": best[0], "temperature": best[1]}, found, {"all_settings": every}))
    by = f"the held-out part ({len(holdout)} images)" if holdout else "order of the lists, nothing being held out"
    description = (
        f"weighted kNN on L2-normalised features (arXiv:1805.01978); bank: {runs[0].labels} labelled images of"
        f" {train.name}/train; k and T chosen by {by}; all {len(test)} test images"
    )
    return classification_result(job, runs, test, description)
