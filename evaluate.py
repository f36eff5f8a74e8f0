"""Score an encoder: ``python evaluate.py PROTOCOL RUN_OR_WEIGHTS [--data …] [key=value …]``.

Each command prints a table with its protocol and ends with one JSON line. The record is kept in the run's folder
``evaluations``, and the scores go to its TensorBoard.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from configs.recipe import RecipeError, explain_errors, load_recipe, parse_overrides
from pipelines.sources import DataConfig, DataError, open_source
from trainers.encoders import EncoderConfig
from trainers.features import load_encoder, random_encoder, raw_pixels
from trainers.protocols import Job, ProtocolSettings, Result, find_protocol, protocol_names
from trainers.state import CheckpointError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Score an encoder on its data, or on other. Settings are chosen on the held-out part of the training images,"
    " never on test, which is always scored whole.",
)
# Names of runs, data and classes are shown as they are: [bold] and :smile: have no meaning in them.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


Target = Annotated[Path | None, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or encoder.safetensors.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value")]
DataOption = Annotated[str | None, typer.Option(help="A data source by name, or a recipe whose data section is used.")]
Baseline = Annotated[str | None, typer.Option(help="pixels or random, in place of a trained encoder.")]


def _command(name: str) -> Callable[..., None]:
    def run(
        target: Target = None, overrides: Overrides = None, data: DataOption = None, baseline: Baseline = None
    ) -> None:
        with _readable_errors(), _processes() as group:
            protocol = find_protocol(name)
            job = _prepare(protocol.Settings, target, overrides, data, baseline, group)
            result = protocol.score(job)
            if job.is_main:
                _publish(name, job, result)

    return run


def _first_line(protocol: str) -> str:
    return (inspect.getdoc(find_protocol(protocol)) or "").partition("\n")[0]


for _name in protocol_names():
    app.command(_name, help=_first_line(_name))(_command(_name))


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What a user can mend ends in one line and exit code 2."""
    try:
        yield
    except (RecipeError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def _processes() -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that torchrun or deepspeed started for this evaluation; None if it is this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _prepare(
    expected: type[ProtocolSettings],
    target: Path | None,
    overrides: list[str] | None,
    data: str | None,
    baseline: str | None,
    group: dist.ProcessGroup | None,
) -> Job[Any]:
    pairs = list(overrides or [])
    if target is not None and "=" in str(target) and not target.exists():
        pairs.insert(0, str(target))  # no run was given, this is the first key=value
        target = None
    settings = _validated(expected, parse_overrides(pairs), "command line")
    if baseline is not None and baseline not in ("pixels", "random"):
        raise RecipeError(f"--baseline={baseline} is not known; choose pixels or random")
    if (target is None) == (baseline is None):
        raise RecipeError("name a run folder or weights to score, or --baseline pixels|random with --data, not both")
    encoder = load_encoder(target) if target is not None else None
    if baseline == "pixels" and "encoder" in settings.model_fields_set:
        raise RecipeError("encoder is for --baseline random; raw pixels have none")
    base, arch, size = _data_section(data)
    if not base and encoder is not None and encoder.data is not None:
        base = encoder.data.model_dump(exclude_none=True)
    if not base and not settings.data and (settings.needs_data or encoder is None):
        raise RecipeError("--data is needed: the name of a data source, or a recipe")
    if encoder is not None and (settings.size is not None or "encoder" in settings.model_fields_set):
        raise RecipeError("size and encoder are for --baseline; a trained encoder knows its own")
    config = _validated(DataConfig, {**base, **settings.data}, "data")
    device: str = settings.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device=cuda, but no CUDA device is available; choose auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and group is not None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if encoder is None:
        train = open_source(config, "train")
        size = settings.size or size
        if baseline == "pixels":
            encoder = raw_pixels(train, size)
        else:
            chosen = settings.encoder if "encoder" in settings.model_fields_set else arch or settings.encoder
            encoder = random_encoder(chosen, train, size, settings.seed)
    return Job(encoder, settings, config, torch.device(device), target, group)


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


def _publish(protocol: str, job: Job[Any], result: Result) -> None:
    """Print the table, keep the record, and end with the JSON line."""
    data = result.data or job.data.source
    table = Table(title=f"{protocol} on {data}: {job.encoder.label}")
    for column in result.table[0]:
        table.add_column(column, justify="left" if column == next(iter(result.table[0])) else "right")
    for row in result.table:
        table.add_row(*row.values())
    console.print(table)
    if (low := result.scores.get("interval_low")) is not None:
        high = result.scores["interval_high"]
        console.print(f"{result.metric} {result.value:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    console.print(result.description, style="dim")
    for warning in result.warnings:
        console.print(warning, style="yellow")
    line = {
        "protocol": protocol,
        "metric": result.metric,
        "value": result.value,
        "n_test": result.n_test,
        **result.scores,
        **result.facts,
        "encoder": job.encoder.label,
        "data": data,
        "description": result.description,
    }
    console.print(f"kept in {_keep(protocol, job, result, line)}", style="dim")
    print(json.dumps(line))


def _keep(protocol: str, job: Job[Any], result: Result, line: dict[str, Any]) -> Path:
    """Write the record and its pictures, and the run's TensorBoard; returns the record's path."""
    folder = job.encoder.folder
    folder.mkdir(parents=True, exist_ok=True)
    told_apart_by = [job.encoder.identity, job.settings.model_dump_json(), job.data.model_dump_json()]
    digest = hashlib.sha256(json.dumps(told_apart_by).encode()).hexdigest()[:8]
    labels = [_file_name(result.facts["labels"])] if "labels" in result.facts else []
    stem = "-".join([protocol, line["data"], *labels, digest])
    names = {}
    for name, picture in result.pictures.items():
        names[name] = f"{stem}-{name}.png"
        (folder / names[name]).write_bytes(picture)
    record = {**line, "table": result.table, "warnings": result.warnings, "pictures": names, **result.details}
    path = folder / f"{stem}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1))
    draft.replace(path)
    if job.target is not None and job.encoder.step is not None:
        with SummaryWriter(str(job.target / "tensorboard"), filename_suffix=f".{stem}") as board:
            for name, value in ({result.metric: result.value} | result.scores).items():
                if value is not None:
                    board.add_scalar(f"evaluation/{stem}/{name}", value, job.encoder.step)
    return path


def _file_name(labels: str) -> str:
    """Of a budget such as 10%, or of a list of images."""
    return Path(labels).stem if labels.endswith((".json", ".txt")) else labels.replace("%", "pct")


if __name__ == "__main__":
    app()
