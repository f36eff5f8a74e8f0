"""Raw pixels, the untrained encoder and the trained one: kNN, linear with all labels, linear with few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.sources import DataError, open_source
from trainers.encoders import EncoderConfig
from trainers.features import random_encoder, raw_pixels
from trainers.protocols import ClassificationSettings, Job, Result, knn, linear


class Settings(ClassificationSettings):
    pass


def score(job: Job[Settings]) -> Result:
    """The value is the trained encoder's accuracy with few labels."""
    settings, trained = job.settings, job.encoder
    if job.target is None:
        raise DataError("compare has both baselines in its table; name a run folder or weights to compare with them")
    few = settings.labels if settings.labels != "all" else "10-per-class"
    train = open_source(job.data, "train")
    untrained = random_encoder(trained.config or EncoderConfig(), train, trained.image_size, settings.seed)
    rows = {
        "raw pixels": raw_pixels(train, trained.image_size),
        "random encoder": untrained,
        "pretrained encoder": trained,
    }
    given = settings.model_dump(include=settings.model_fields_set - {"labels"})
    columns: dict[str, tuple[Callable[[Job[Any]], Result], Any]] = {
        "kNN": (knn.score, knn.Settings(**given)),
        "linear": (linear.score, linear.Settings(**given)),
        f"linear, {few.replace('-per-class', ' per class')}": (linear.score, linear.Settings(labels=few, **given)),
    }
    table, found = [], []
    for name, encoder in rows.items():
        cells = {"features": name}
        for column, (protocol, chosen) in columns.items():
            result = protocol(replace(job, encoder=encoder, settings=chosen))
            error = result.scores["standard_error"]
            cells[column] = f"{result.value:.1f}" + (f" ± {error:.1f}" if error is not None else "")
            found.append((name, column, result))
        table.append(cells)
    protocols = [f"{column}: {result.description}" for _, column, result in found[: len(columns)]]
    protocols.append(f"±: standard error over {settings.seeds} draws of the labelled images")
    last = found[-1][-1]
    return Result(
        metric="top1",
        value=last.value,
        n_test=last.n_test,
        description="test top-1 (%). " + ". ".join(protocols),
        table=table,
        scores=last.scores,
        facts={"labels": few},
        details={
            "rows": [
                {"features": name, "column": column, "value": result.value, **result.facts, **result.scores}
                for name, column, result in found
            ]
        },
        warnings=[f"{name}, {column}: {text}" for name, column, result in found for text in result.warnings],
    )
