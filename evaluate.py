"""Score an encoder: ``python evaluate.py {knn,linear,compare} RUN_OR_WEIGHTS [--data …] [key=value …]``.

Each command prints a table with its protocol and ends with one JSON line. Settings are chosen on the held-out part of
the training images; the test split is scored once, whole.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from configs.recipe import RecipeError, explain_errors, load_recipe, parse_overrides
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.subsets import label_subset, save_subset
from trainers.encoders import EncoderConfig
from trainers.features import FrozenEncoder, features_of, load_encoder, random_encoder, raw_pixels
from trainers.knn import knn_votes, top_accuracy
from trainers.linear import search_logistic
from trainers.state import CheckpointError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, soft_wrap=True)


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


@dataclass(frozen=True, slots=True)
class Job:
    encoder: FrozenEncoder
    settings: Settings
    data: DataConfig
    device: torch.device

    def split(self, name: Literal["train", "holdout", "test"]) -> tuple[Source, torch.Tensor, torch.Tensor]:
        """A split with its features [N, d] and labels [N]."""
        source = open_source(self.data, name)
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


def compare_baselines(job: Job, few: str) -> dict[str, Any]:
    train = open_source(job.data, "train")
    trained = job.encoder
    rows = [
        raw_pixels(train, trained.image_size),
        random_encoder(trained.config or EncoderConfig(), train, trained.image_size, job.settings.seed),
        trained,
    ]
    columns: dict[str, tuple[Callable[[Job], dict[str, Any]], str]] = {
        "kNN": (score_knn, "all"),
        "linear": (score_linear, "all"),
        f"linear, {few.replace('-per-class', ' per class')}": (score_linear, few),
    }
    table = Table(title=f"Test top-1 (%) on {train.name}\npretrained: {trained.label}")
    table.add_column("features")
    for column in columns:
        table.add_column(column, justify="right")
    results: list[dict[str, Any]] = []
    for encoder in rows:
        cells = []
        for scorer, labels in columns.values():
            settings = job.settings.model_copy(update={"labels": labels})
            result = scorer(Job(encoder, settings, job.data, job.device))
            results.append(result)
            error = result["standard_error"]
            cells.append(f"{result['value']:.1f}" + (f" ± {error:.1f}" if error is not None else ""))
        table.add_row("pretrained encoder" if encoder is trained else encoder.label, *cells)
    console.print(table)
    for result in results[: len(columns)]:
        console.print(f"{result['protocol']}, {result['labels']} labels: {result['description']}", style="dim")
    console.print(f"±: standard error over {job.settings.seeds} draws of the labelled images", style="dim")
    last = results[-1]
    return {**last, "protocol": "compare", "rows": results}


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
    config = _validated(DataConfig, {**base, **settings.data}, "data")
    device = settings.device
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
    folder = job.encoder.folder
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(
        [result["protocol"], job.data.source, result["labels"].replace("%", "pct"), job.encoder.identity[:8]]
    )
    path = folder / f"{name}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(path)
    console.print(f"kept in {path}", style="dim")
    print(json.dumps({key: value for key, value in result.items() if key not in ("runs", "rows")}))


if __name__ == "__main__":
    app()
