"""Logistic regression on frozen features by L-BFGS, its L2 strength chosen on the held-out part."""

from __future__ import annotations

from pipelines.sources import DataError
from trainers.linear import search_logistic
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import accuracy


class Settings(ClassificationSettings):
    pass


def score(job: Job[Settings]) -> Result:
    """L2 strength by the held-out part."""
    train, holdout, test = job.splits()
    if holdout is None:
        raise DataError(f"{train.name} has no held-out part to choose the L2 strength on; set data.holdout above 0")
    subsets = labelled(job, train)
    features, labels = job.features(train)
    holdout_features, holdout_labels = job.features(holdout)
    test_features, test_labels = job.features(test)
    runs, at_edge = [], False
    for chosen in subsets:
        search = search_logistic(features[chosen], labels[chosen], holdout_features, holdout_labels, train.num_classes)
        at_edge |= search.at_edge
        found = accuracy(search.best.logits(test_features), test_labels)
        more = {"holdout_top1": search.holdout_top1[search.best.l2], "l2_at_edge_of_grid": search.at_edge}
        runs.append(Run(len(chosen), {"l2": search.best.l2}, found, more))
    description = (
        f"logistic regression by full-batch L-BFGS on frozen, standardised features; {runs[0].labels} labelled"
        f" images of {train.name}/train; L2 chosen by the held-out part ({len(holdout)} images); all {len(test)} test"
        " images, no augmentation"
    )
    result = classification_result(job, runs, test, description)
    if at_edge:
        result.warnings.append("the L2 strength chosen is the smallest or largest tried")
    return result
