"""Multi-label classification of VOC07 by linear SVMs and logistic regression on frozen features, as mean AP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipelines.sources import DataError, Source, describe, open_source
from trainers.linear import mean_and_scale
from trainers.multilabel import (
    Fit,
    LinearScores,
    average_precision,
    choose_strengths,
    fit_logistic_heads,
    fit_svms,
    folds,
)
from trainers.protocols import Job, ProtocolSettings, Result
from trainers.scores import as_png

Strength = Annotated[float, Field(gt=0)]


class Settings(ProtocolSettings):
    costs: tuple[Strength, ...] = Field((0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100), min_length=1)  # the SVM's C
    l2: tuple[Strength, ...] = Field((1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10), min_length=1)  # the logistic head's
    select: Literal["cv", "holdout"] = "cv"  # where C and L2 are chosen, class by class
    folds: int = Field(3, ge=2, le=20)  # of select=cv


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of classifier, fitted on all training images and scored on test."""

    strengths: Tensor  # [C], chosen
    eleven: Tensor  # [C] average precision over eleven recalls, in percent
    area: Tensor  # [C] all of it
    classifier: LinearScores
    at_edge: int  # classes whose strength is the smallest or largest tried


def score(job: Job[Settings]) -> Result:
    """The value is the SVMs' mean 11-point AP. Fitted on train and holdout together, once C and L2 are chosen."""
    settings = job.settings
    parts, test = _splits(job)
    gathered = [job.features(part) for part in parts]
    order = torch.cat([part.ids for part in parts]).argsort().to(job.device)  # whatever was held out, one order
    features, targets = (torch.cat(tensors)[order] for tensors in zip(*gathered, strict=True))
    test_features, test_targets = job.features(test)
    if settings.select == "cv":
        held_out = folds(targets, settings.folds, settings.seed)
        by = f"{settings.folds}-fold cross-validation within them"
    else:
        away = torch.arange(len(targets), device=job.device) >= len(parts[0])  # holdout comes second
        held_out = [away[order][:, None].expand_as(targets)]
        by = f"the held-out part ({len(parts[1])} of them)"
    unit = F.normalize(features), F.normalize(test_features)
    heads = {
        "svm": _head(fit_svms, unit, (targets, test_targets), held_out, tuple(sorted(settings.costs))),
        "logistic": _head(
            fit_logistic_heads,
            _standardised(features, test_features),
            (targets, test_targets),
            held_out,
            tuple(sorted(settings.l2, reverse=True)),
        ),
    }
    images = sum(len(part) for part in parts)
    description = (
        f"frozen features of the central square; {images} images of {test.name}'s training part (VOC: trainval), "
        f"strengths chosen for each class by {by}, then fitted on all of them; SVM: linear, one-vs-rest, squared hinge,"
        " positives weighted 2, L2-normalised features (arXiv:1905.01235); logistic: one-vs-rest, standardised"
        " features; per-class AP over the images where the class is not only 'difficult', mean over the classes,"
        f" 11-point (VOC 2007) and whole area; all {len(test)} test images"
    )
    return _result(job, heads, test, description)


def _splits(job: Job[Settings]) -> tuple[list[Source], Source]:
    """train (and holdout, if there is one), and test."""
    train = open_source(job.data, "train")
    if not train.multi_label:
        raise DataError(f"{train.name} has one label an image; this protocol is for several (voc07); use linear or knn")
    parts = [train]
    if describe(job.data).counts["holdout"]:
        parts.append(open_source(job.data, "holdout"))
    elif job.settings.select == "holdout":
        raise DataError(f"{train.name} has no held-out part to choose on; set data.holdout above 0, or select=cv")
    test = open_source(job.data, "test")
    if not (test.labels > 0).any():
        raise DataError(f"{test.name}: no test image shows any class that is not 'difficult'; nothing can be scored")
    return parts, test


def _standardised(features: Tensor, test_features: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = mean_and_scale(features)
    return (features - mean) / scale, (test_features - mean) / scale


def _head(
    fit: Fit,
    inputs: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    held_out: list[Tensor],
    grid: tuple[float, ...],
) -> Head:
    strengths, _ = choose_strengths(fit, inputs[0], targets[0], held_out, grid)
    classifier = fit(inputs[0], targets[0], strengths)
    eleven, area = average_precision(classifier(inputs[1]), targets[1])
    edges = torch.tensor([min(grid), max(grid)], dtype=torch.float64)
    at_edge = int(torch.isin(strengths, edges).sum()) if len(grid) > 1 else 0
    return Head(strengths, 100 * eleven, 100 * area, classifier, at_edge)


def _result(job: Job[Settings], heads: dict[str, Head], test: Source, description: str) -> Result:
    known = (test.labels >= 0).sum(0)
    positives = (test.labels > 0).sum(0)
    scored = positives > 0
    chance = (100 * positives / known.clamp_min(1)).double()
    table, scores = [], {}
    for name, head in heads.items():
        scores[f"{name}_map11"] = head.eleven[scored].mean().item()
        scores[f"{name}_map"] = head.area[scored].mean().item()
        low, middle, high = head.strengths.quantile(torch.tensor([0, 0.5, 1.0], dtype=torch.float64)).tolist()
        strength = "C" if name == "svm" else "L2"
        table.append(
            {
                "head": name,
                "chosen by class": f"{strength} {low:.3g} to {high:.3g}, median {middle:.3g}",
                "test mAP, 11-point (%)": f"{scores[f'{name}_map11']:.2f}",
                "test mAP, area (%)": f"{scores[f'{name}_map']:.2f}",
            }
        )
    share = chance[scored].mean().item()
    table.append(dict(zip(table[0], ["chance (positives)", "–", "–", f"{share:.2f}"], strict=True)))
    per_class = {
        label: {
            "test_images": int(known[column]),
            "positives": int(positives[column]),
            **{
                f"{name}_{what}": None if math.isnan(value) else value
                for name, head in heads.items()
                for what, value in (
                    ("ap11", head.eleven[column].item()),
                    ("ap", head.area[column].item()),
                    ("strength", head.strengths[column].item()),
                )
            },
        }
        for column, label in enumerate(test.classes)
    }
    return Result(
        metric="map11",
        value=scores["svm_map11"],
        n_test=len(test),
        description=description,
        table=table,
        scores={**scores, "chance": share},
        facts={"select": job.settings.select},
        details={"per_class": per_class},
        pictures={"per-class": _bars(heads, chance, test.classes, job.encoder.label)},
        warnings=_warnings(heads, [c for c, there in zip(test.classes, scored, strict=True) if not there]),
    )


def _warnings(heads: dict[str, Head], missing: list[str]) -> list[str]:
    found = []
    if missing:
        found.append(f"without a positive test image, and so left out of the means: {', '.join(missing)}")
    for name, head in heads.items():
        if head.at_edge:
            found.append(
                f"{name}: {head.at_edge} of {len(head.strengths)} classes chose the smallest or largest strength tried"
            )
        if not head.classifier.converged:
            found.append(f"{name}: not every class converged")
    return found


def _bars(heads: dict[str, Head], chance: Tensor, classes: tuple[str, ...], label: str) -> bytes:
    """A PNG: 11-point AP of every class that was scored, the best above."""
    from matplotlib.figure import Figure

    by_svm = heads["svm"].eleven
    order = [column for column in by_svm.argsort(stable=True).tolist() if not math.isnan(by_svm[column])]
    rows = torch.arange(len(order)).double()
    figure = Figure(figsize=(7, max(2.5, 0.3 * len(order) + 1.6)), layout="constrained")
    axes = figure.subplots()
    for offset, (name, head) in zip((0.2, -0.2), heads.items(), strict=True):
        mean = head.eleven.nanmean().item()
        axes.barh(rows + offset, head.eleven[order], height=0.4, label=f"{name}, mean {mean:.1f}")
    axes.plot(chance[order], rows, "k|", markersize=9, label="share of positives")
    axes.set_yticks(rows.tolist(), [classes[column] for column in order])
    axes.set(xlabel="11-point average precision (%)", xlim=(0, 100), title=label)
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return as_png(figure)
