"""Score an encoder: ``python evaluate.py {knn,linear,compare} RUN_OR_WEIGHTS [--data …] [key=value …]``.

Each command prints a table with its protocol and ends with one JSON line. Settings are chosen on the held-out part of
the training images, never on test, which is always scored whole.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from configs.recipe import RecipeError, explain_errors, load_recipe, parse_overrides
from pipelines.sources import DataConfig, DataError, open_source
from trainers.encoders import EncoderConfig
from trainers.features import load_encoder, random_encoder, raw_pixels
from trainers.protocols import Job, Settings, score_knn, score_linear
from trainers.state import CheckpointError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="Score an encoder on its data, or on other."
)
console = Console(highlight=False, soft_wrap=True)


Target = Annotated[Path | None, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or encoder.safetensors.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value")]
DataOption = Annotated[str | None, typer.Option(help="A data source by name, or a recipe whose data section is used.")]
Baseline = Annotated[str | None, typer.Option(help="pixels or random, in place of a trained encoder.")]


@app.command()
def knn(target: Target = None, overrides: Overrides = None, data: DataOption = None, baseline: Baseline = None) -> None:
    """Weighted k-nearest-neighbour classification, several k and temperatures in one search."""
    with _readable_errors():
        job = _prepare(target, overrides, data, baseline)
        _publish(job, score_knn(job))


@app.command()
def linear(
    target: Target = None, overrides: Overrides = None, data: DataOption = None, baseline: Baseline = None
) -> None:
    """Logistic regression on frozen features by L-BFGS, its L2 strength chosen on the held-out part."""
    with _readable_errors():
        job = _prepare(target, overrides, data, baseline)
        _publish(job, score_linear(job))


@app.command()
def compare(target: Target = None, overrides: Overrides = None, data: DataOption = None) -> None:
    """Raw pixels, the untrained encoder and the trained one: kNN, linear with all labels, linear with few."""
    with _readable_errors():
        job = _prepare(target, overrides, data, None)
        few = job.settings.labels if job.settings.labels != "all" else "10-per-class"
        _publish(job, compare_baselines(job, few))


def compare_baselines(job: Job, few: str) -> dict[str, Any]:
    """Raw pixels, the untrained encoder and the trained one, each by kNN and by linear with all and few labels."""
    train = open_source(job.data, "train")
    trained = job.encoder
    rows = {
        "raw pixels": raw_pixels(train, trained.image_size),
        "random encoder": random_encoder(
            trained.config or EncoderConfig(), train, trained.image_size, job.settings.seed
        ),
        "pretrained encoder": trained,
    }
    columns = {
        "kNN": (score_knn, "all"),
        "linear": (score_linear, "all"),
        f"linear, {few.replace('-per-class', ' per class')}": (score_linear, few),
    }
    table = Table(title=f"Test top-1 (%) on {train.name}\npretrained: {trained.label}")
    table.add_column("features")
    for column in columns:
        table.add_column(column, justify="right")
    results: list[dict[str, Any]] = []
    for name, encoder in rows.items():
        cells = []
        for score, labels in columns.values():
            settings = job.settings.model_copy(update={"labels": labels})
            result = score(Job(encoder, settings, job.data, job.device))
            results.append(result)
            error = result["standard_error"]
            cells.append(f"{result['value']:.1f}" + (f" ± {error:.1f}" if error is not None else ""))
        table.add_row(name, *cells)
    console.print(table)
    for result in results[: len(columns)]:
        console.print(f"{result['protocol']}, {result['labels']} labels: {result['description']}", style="dim")
    console.print(f"±: standard error over {job.settings.seeds} draws of the labelled images", style="dim")
    return {**results[-1], "protocol": "compare", "rows": results}


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What a user can mend ends in one line and exit code 2."""
    try:
        yield
    except (RecipeError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _prepare(target: Path | None, overrides: list[str] | None, data: str | None, baseline: str | None) -> Job:
    pairs = list(overrides or [])
    if target is not None and "=" in str(target) and not target.exists():
        pairs.insert(0, str(target))  # no run was given, this is the first key=value
        target = None
    settings = _validated(Settings, parse_overrides(pairs), "command line")
    if baseline is not None and baseline not in ("pixels", "random"):
        raise RecipeError(f"--baseline={baseline} is not known; choose pixels or random")
    if (target is None) == (baseline is None):
        raise RecipeError("name a run folder or weights to score, or --baseline pixels|random with --data, not both")
    encoder = load_encoder(target) if target is not None else None
    base, arch, size = _data_section(data)
    if not base and encoder is not None and encoder.data is not None:
        base = encoder.data.model_dump(exclude_none=True)
    if not base and not settings.data:
        raise RecipeError("--data is needed: the name of a data source, or a recipe")
    if encoder is not None and (settings.size is not None or "encoder" in settings.model_fields_set):
        raise RecipeError("size and encoder are for --baseline; a trained encoder knows its own")
    config = _validated(DataConfig, {**base, **settings.data}, "data")
    device = settings.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device=cuda, but no CUDA device is available; choose auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if encoder is None:
        train = open_source(config, "train")
        size = settings.size or size
        if baseline == "pixels":
            encoder = raw_pixels(train, size)
        else:
            chosen = settings.encoder if "encoder" in settings.model_fields_set else arch or settings.encoder
            encoder = random_encoder(chosen, train, size, settings.seed)
    return Job(encoder, settings, config, torch.device(device))


def _data_section(data: str | None) -> tuple[dict[str, Any], EncoderConfig | None, int | None]:
    """What --data names: a source, or a recipe's data section with its encoder and view size."""
    if data is None:
        return {}, None, None
    if data.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(data))
        return recipe.data.model_dump(exclude_none=True), recipe.encoder, recipe.views.size
    return {"source": data}, None, None


Model = TypeVar("Model", bound=BaseModel)


def _validated(model: type[Model], values: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain_errors(error, model)}") from None


def _publish(job: Job, result: dict[str, Any]) -> None:
    """Print the table, keep the record, and end with the JSON line."""
    if result["protocol"] != "compare":
        table = Table(title=f"{result['protocol']} on {result['data']}: {result['encoder']}")
        for column in ("labels", "chosen on the held-out part", "test top-1 (%)", "test top-5 (%)"):
            table.add_column(column, justify="right")
        for run in result["runs"]:
            setting = f"L2 {run['l2']:.1e}" if "l2" in run else f"k={run['k']} T={run['temperature']:g}"
            top5 = "–" if run["top5"] is None else f"{run['top5']:.2f}"
            table.add_row(str(run["labels"]), setting, f"{run['top1']:.2f}", top5)
        console.print(table)
        console.print(result["description"], style="dim")
        if any(run.get("l2_at_edge_of_grid") for run in result["runs"]):
            console.print("the L2 strength chosen is the smallest or largest tried", style="yellow")
    folder = job.encoder.folder
    folder.mkdir(parents=True, exist_ok=True)
    told_apart_by = [job.encoder.identity, job.settings.model_dump_json(), job.data.model_dump_json()]
    digest = hashlib.sha256(json.dumps(told_apart_by).encode()).hexdigest()[:8]
    budget = Path(result["labels"]).stem.replace("%", "pct")
    path = folder / f"{result['protocol']}-{job.data.source}-{budget}-{digest}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(path)
    console.print(f"kept in {path}", style="dim")
    print(json.dumps({key: value for key, value in result.items() if key not in ("runs", "rows")}))


if __name__ == "__main__":
    app()
