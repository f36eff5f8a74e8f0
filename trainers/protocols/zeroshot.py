"""Zero-shot classification by a CLIP model's text tower: of a student distilled from it, or of the teacher itself.

Distillation by distance correlation fixes a student's distances and not its coordinates, so its features are first
mapped to the teacher's image embeddings by ridge regression: on training images, without a label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.sources import DataError, Source
from trainers.features import FrozenEncoder, weights_hash
from trainers.methods import clipdistill
from trainers.parts.clip_teacher import ClipTeacher
from trainers.parts.clip_text import ClipText, class_prompts, read_names, read_templates
from trainers.protocols import Job, ProtocolSettings, Result
from trainers.scores import Accuracy, accuracy, bootstrap_interval, confusion_picture
from trainers.whole import load_method, method_config
from trainers.zeroshot import RidgeSearch, bregman_divergences, cosine_scores, search_ridge


class Settings(ProtocolSettings):
    scored: Literal["student", "teacher"] = "student"
    similarity: Literal["cosine", "bregman"] = "cosine"  # whose figures are the result; the table has both
    embedding: Literal["features", "z"] = "features"  # of the student: what its encoder gives, or its projector
    teacher: str | None = None  # of open_clip; None: the run's own
    pretrained: str | None = None  # the tag or file of its weights
    templates: Path | None = None  # a file, a prompt with one {} a line
    names: Path | None = None  # a file that says what the classes are called


@dataclass(frozen=True, slots=True)
class _Named:
    """Which CLIP model, and how images are resized for it."""

    teacher: str
    pretrained: str | None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __str__(self) -> str:
        return self.teacher + (f" ({self.pretrained})" if self.pretrained else "")


class _Tower(nn.Module):
    """The teacher's image tower as an encoder [n, 3, H, W] -> [n, D]."""

    def __init__(self, teacher: ClipTeacher) -> None:
        super().__init__()
        self._teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        return self._teacher.embed(images)


def score(job: Job[Settings]) -> Result:
    """The value is the top-1 accuracy of the student, mapped, or of the teacher, by cosine or Bregman divergence."""
    settings = job.settings
    train, holdout, test = job.splits()
    named = _named(job)
    templates, names = read_templates(settings.templates), read_names(settings.names, test.classes)
    student = _student(job) if settings.scored == "student" else None
    if student is not None and holdout is None:
        raise DataError(f"{train.name} has no held-out part to choose the L2 strength on; set data.holdout above 0")
    text = ClipText(named.teacher, named.pretrained).embed(class_prompts(names, templates), job.device)
    prompts = text.unflatten(0, (len(names), len(templates)))
    tower = _tower(job, named)
    rows = {"teacher": job.stored_features(test, encoder=tower).to(job.device)}
    search = None
    if student is not None and holdout is not None:
        taught = (job.stored_features(part, encoder=tower).to(job.device) for part in (train, holdout))
        wanted = [F.normalize(part, dim=1) for part in taught]
        search = search_ridge(student(train), wanted[0], student(holdout), wanted[1])
        rows = {"student": search.best(student(test))} | rows
    labels = test.labels.to(job.device)
    found = {}
    for who, embeddings in rows.items():
        found[who, "cosine"] = accuracy(cosine_scores(embeddings, prompts), labels)
        found[who, "bregman"] = accuracy(-bregman_divergences(embeddings, prompts), labels)
    described = _description(job, named, len(templates), train, holdout, test)
    return _result(job, found, search, test, described, {"teacher": str(named), "templates": list(templates)})


def _named(job: Job[Settings]) -> _Named:
    """The CLIP model that was asked for, or the one that the run was distilled from."""
    settings, target = job.settings, job.target
    if settings.teacher is not None:
        if (":" in settings.teacher) != (settings.pretrained is None):
            raise DataError(
                f"teacher={settings.teacher} with pretrained={settings.pretrained}: a model of open_clip needs a tag or"
                " a file of weights, local-dir: and hf-hub: bring theirs (no pretrained)"
            )
        return _Named(settings.teacher, settings.pretrained)
    config = method_config(target) if target is not None and target.is_dir() else None
    if not isinstance(config, clipdistill.Config):
        raise DataError(
            f"{job.encoder.label} does not say which CLIP model to compare with (only runs of method clipdistill do);"
            " name one: teacher=ViT-B-16 pretrained=laion400m_e32, or teacher=local-dir:FOLDER"
        )
    return _Named(config.teacher, settings.pretrained or config.pretrained, config.interpolation)


def _tower(job: Job[Settings], named: _Named) -> FrozenEncoder:
    """The teacher as an encoder, whose embeddings are cached like any other's. It sees what the student sees."""
    encoder = job.encoder
    how = named.interpolation
    teacher = ClipTeacher(named.teacher, named.pretrained, mean=encoder.mean, std=encoder.std, interpolation=how)
    identity = f"clip-{how}-{teacher.size}-{weights_hash(teacher.state())}"
    return replace(encoder, label=str(named), module=_Tower(teacher), identity=identity, config=None, step=None)


def _student(job: Job[Settings]) -> Callable[[Source], Tensor]:
    """From a split to the student's embeddings [N, d]: its features, or their projections."""
    if job.settings.embedding == "features":
        return lambda source: job.features(source)[0]
    if job.target is None or not job.target.is_dir():
        raise DataError("embedding=z takes a run folder, which holds the projector; use embedding=features")
    method = load_method(job.target, job.encoder.step)
    projector = getattr(method, "projector", None)
    if not isinstance(projector, nn.Module):
        raise DataError(f"{job.encoder.label} has no projector; use embedding=features")
    projector = projector.to(job.device)

    @torch.no_grad()
    def embed(source: Source) -> Tensor:
        return torch.cat([projector(rows) for rows in job.features(source)[0].split(4096)])

    return embed


def _result(
    job: Job[Settings],
    found: dict[tuple[str, str], Accuracy],
    search: RidgeSearch | None,
    test: Source,
    description: str,
    facts: dict[str, Any],
) -> Result:
    settings = job.settings
    rows = []
    intervals = {}
    for (who, how), of in found.items():
        low, high = intervals[who, how] = bootstrap_interval(100 * of.correct.double())
        rows.append(
            {
                "embedding": "teacher" if who == "teacher" else f"student ({settings.embedding}), mapped",
                "compared by": "cosine" if how == "cosine" else "Bregman divergence",
                "test top-1 (%)": f"{of.top1:.2f}",
                "95 % interval": f"{low:.2f} to {high:.2f}",
                "test top-5 (%)": "–" if of.top5 is None else f"{of.top5:.2f}",
            }
        )
    main = (settings.scored, settings.similarity)
    low, high = intervals[main]
    scores: dict[str, float | None] = {"top1": found[main].top1, "top5": found[main].top5}
    scores |= {"interval_low": low, "interval_high": high}
    scores |= {f"{who}_{how}_top1": of.top1 for (who, how), of in found.items()}
    if search is not None:
        scores["holdout_cosine"] = search.holdout_cosine[search.best.l2]
    title = f"{job.encoder.label}, {main[0]}: {found[main].top1:.1f} % right without labels"
    return Result(
        metric="top1",
        value=found[main].top1,
        n_test=len(test),
        description=description,
        table=rows,
        scores=scores,
        facts={"scored": settings.scored, "similarity": settings.similarity, **facts},
        details={
            "l2": None if search is None else search.best.l2,
            "per_class": dict(zip(test.classes, found[main].per_class, strict=True)),
            "confusion": found[main].confusion.tolist() if len(test.classes) <= 100 else None,
        },
        pictures={"confusion": confusion_picture(found[main].confusion, test.classes, title)},
        warnings=["the L2 strength chosen is the smallest or largest tried"] if search and search.at_edge else [],
    )


def _description(
    job: Job[Settings], named: _Named, templates: int, train: Source, holdout: Source | None, test: Source
) -> str:
    of = "ours" if job.settings.templates is None else job.settings.templates.name
    many = "1 prompt" if templates == 1 else f"{templates} prompts"
    parts = [
        f"{many} a class ({of}) through the text tower of {named}; cosine with the mean of a class's unit prompt"
        " embeddings; Bregman divergence to its nearest prompt, φ(x) = max over all prompts <x, t>"
    ]
    if job.settings.scored == "student" and holdout is not None:
        what = "features" if job.settings.embedding == "features" else "projections z"
        parts.append(
            f"student: ridge regression from its standardised {what} to the teacher's unit image embeddings, on the"
            f" {len(train)} images of {train.name}/train without labels; L2 chosen by the cosine on the held-out part"
            f" ({len(holdout)} images)"
        )
    size = job.encoder.image_size
    parts.append(
        f"all {len(test)} test images at {size} pixels, which the teacher resizes; 95 % intervals by bootstrap"
    )
    return "; ".join(parts)
