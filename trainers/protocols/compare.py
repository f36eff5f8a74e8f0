"""Raw pixels, the untrained encoder and the trained one: kNN, linear with all labels, linear with few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.sources import open_source
from trainers.encoders import EncoderConfig
from trainers.features import random_encoder, raw_pixels
from trainers.protocols import Job, Result, knn, linear


class Settings(knn.Settings, linear.Settings):
    pass


def score(job: Job[Settings]) -> Result:
    """The value is the trained encoder's accuracy with few labels."""
    few = job.settings.labels if job.settings.labels != "all" else "10-per-class"
    train, trained = open_source(job.data, "train"), job.encoder
    untrained = random_encoder(trained.config or EncoderConfig(), train, trained.image_size, job.settings.seed)
    rows = {
        "raw pixels": raw_pixels(train, trained.image_size),
        "random encoder": untrained,
        "pretrained encoder": trained,
    }
    columns: dict[str, tuple[Callable[[Job[Any]], Result], str]] = {
        "kNN": (knn.score, "all"),
        "linear": (linear.score, "all"),
        f"linear, {few.replace('-per-class', ' per class')}": (linear.score, few),
    }
    table, found = [], []
    for name, encoder in rows.items():
        cells = {"features": name}
        for column, (protocol, labels) in columns.items():
            settings = job.settings.model_copy(update={"labels": labels})
            result = protocol(Job(encoder, settings, job.data, job.device))
            error = result.scores["standard_error"]
            cells[column] = f"{result.value:.1f}" + (f" ± {error:.1f}" if error is not None else "")
            found.append((name, column, labels, result))
        table.append(cells)
    protocols = [f"{column}: {result.description}" for _, column, _, result in found[: len(columns)]]
    protocols.append(f"±: standard error over {job.settings.seeds} draws of the labelled images")
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
                {"features": name, "column": column, "labels": labels, "value": result.value, **result.scores}
                for name, column, labels, result in found
            ]
        },
    )
