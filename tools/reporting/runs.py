"""What a run folder holds, read so that a run that is young, stopped or damaged is still shown as far as it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.recipe import RecipeError, explain_errors
from pipelines.foreign import MOST_RECIPE, load_json, load_yaml, read_text
from pipelines.sources import DataConfig
from pipelines.views import ViewsConfig


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    epoch: float
    value: float


@dataclass(frozen=True, slots=True)
class Record:
    """An evaluation's file, and its values."""

    path: Path
    values: Mapping[str, Any]

    @property
    def title(self) -> str:
        labels = self.values.get("labels", "all")
        budget = "" if labels in ("all", None) else f", labels {labels}"
        return f"{self.values['protocol']} on {self.values.get('data', 'unknown data')}{budget}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run. ``problems`` are what could not be read, in words for the page."""

    path: Path
    name: str  # told apart from the other runs of the page
    number: int  # its place on the page: colour and dashes
    recipe: Mapping[str, Any]
    curves: Mapping[str, Sequence[Point]]  # finite values by key, in the order of the log
    broken: Mapping[str, int]  # the first step at which a key was NaN or infinite
    last: tuple[int, float] | None  # step and epoch of the last row
    records: Sequence[Record]
    problems: Sequence[str]

    def get(self, key: str) -> Any:
        """A setting by its dotted key; None where the recipe has none."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def seed(self) -> int:
        """0 where the recipe has none that can be used."""
        value = self.get("seed")
        return value if isinstance(value, int) and 0 <= value < 2**62 else 0

    @property
    def data(self) -> DataConfig:
        """Where the run's images are; a report downloads nothing.

        Raises RecipeError where the recipe's section cannot be understood; so does ``views``.
        """
        config: DataConfig = self._section("data", DataConfig)
        return config.model_copy(update={"download": False})

    @property
    def views(self) -> ViewsConfig:
        config: ViewsConfig = self._section("views", ViewsConfig)
        return config

    def _section(self, key: str, model: type[Any]) -> Any:
        values = self.recipe.get(key)
        try:
            return model.model_validate({} if values is None else values)
        except ValidationError as error:
            raise RecipeError(f"{self.path / 'recipe.yaml'}: {key}: {_one_line(error, model)}") from None


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs in the order given.

    Raises:
        RecipeError: one is not a run folder, or is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if not path.is_dir():
            raise RecipeError(f"{path} is not a folder; expected a run folder, such as runs/quickstart")
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(f"{path} is not a run folder: it has no recipe.yaml")
        if resolved[number] in resolved[:number]:
            raise RecipeError(f"{path} is given twice")
    names = [path.name for path in resolved]
    unique = len(set(names)) == len(names)
    return [
        _read_run(path, name if unique else str(path), number)
        for number, (path, name) in enumerate(zip(paths, names, strict=True))
    ]


def _read_run(path: Path, name: str, number: int) -> RunFolder:
    problems: list[str] = []
    recipe = _read_recipe(path / "recipe.yaml", problems)
    curves: dict[str, list[Point]] = {}
    broken: dict[str, int] = {}
    last = None
    for row in _read_rows(path / "metrics.jsonl", problems):
        step, epoch = last = int(row["step"]), float(row["epoch"])
        for key, value in row.items():
            if key in ("step", "epoch") or not _is_number(value):
                continue
            if _is_finite(value):
                curves.setdefault(key, []).append(Point(step, epoch, float(value)))
            else:
                broken.setdefault(key, step)
    records = [record for file in sorted(path.glob("evaluations/*.json")) if (record := _read_record(file, problems))]
    return RunFolder(path, name, number, recipe, curves, broken, last, records, problems)


def _read_recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        recipe = load_yaml(read_text(path, MOST_RECIPE))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"recipe.yaml cannot be read: {error}")
        return {}
    if not isinstance(recipe, dict):
        problems.append("recipe.yaml holds no settings")
        return {}
    return recipe


def _read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The whole rows. A last line that is cut short, of a run that is being written or was killed, is no problem."""
    try:
        lines = read_text(path, errors="replace").splitlines()
    except FileNotFoundError:
        problems.append("there is no metrics.jsonl: nothing was logged yet, so there are no curves")
        return []
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read: {error}")
        return []
    rows, damaged = [], 0
    for number, line in enumerate(lines):
        try:
            row = load_json(line)
        except ValueError:
            damaged += number < len(lines) - 1
            continue
        if isinstance(row, dict) and all(_is_finite(row.get(key)) for key in ("step", "epoch")):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        problems.append(f"{damaged} of the {len(lines)} lines of metrics.jsonl cannot be read and are left out")
    if not rows:
        problems.append("metrics.jsonl has no row yet, so there are no curves")
    return rows


def _read_record(path: Path, problems: list[str]) -> Record | None:
    try:
        values = load_json(read_text(path))
    except (OSError, ValueError) as error:
        problems.append(f"evaluations/{path.name} cannot be read: {error}")
        return None
    if not isinstance(values, dict) or not {"protocol", "metric", "value"} <= set(values):
        problems.append(f"evaluations/{path.name} is not the record of an evaluation")
        return None
    return Record(path, values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    try:
        return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond all floats
        return False


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    return explain_errors(error, model).replace("\n", "; ")
