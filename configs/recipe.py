"""The recipe of a run: one YAML file, checked whole before anything expensive starts.

``extends: other.yaml`` merges another recipe underneath, or several (a list, later ones on top); ``a.b=c`` on the
command line goes on top of all. Every key is typed, unknown keys are errors, and errors name the key, the value and the
nearest valid choice.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, create_model

from pipelines.config import Section
from pipelines.foreign import MOST_LEVELS, MOST_RECIPE, load_yaml, printable, read_text, shortened
from pipelines.order import count_steps
from pipelines.sources import DataConfig, DataError, describe
from pipelines.views import ViewsConfig
from trainers.encoders import EncoderConfig
from trainers.engine import EngineConfig
from trainers.methods import MethodConfig, find_method, method_names
from trainers.monitors import MonitorConfig
from trainers.optim import OptimConfig, ScheduleConfig, build_schedule
from trainers.runlog import LogConfig
from trainers.state import LOCK, CheckpointConfig
from trainers.status import LAUNCH

# What does not change what is trained: left out of the hash, and free to change in an existing run.
_ASIDE = (
    *("run", "log", "checkpoint", "data.root", "data.url", "data.download"),
    *("engine.timeout", "engine.start_timeout", "engine.watch_port", "engine.keep_memory"),
    *("engine.nonfinite", "engine.skips_in_a_row", "engine.skips"),
    *("data.loader", "data.workers", "data.ahead", "data.os_cache", "data.decode", "data.hw_decoder_load"),
)


MOST_FILES = 100  # that a recipe may extend, one by way of the other


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is for the person who wrote it."""

    def __str__(self) -> str:
        return printable(super().__str__(), lines=True)


class RunConfig(Section):
    dir: Path | None = None  # None: runs/<recipe's name>-<hash of the resolved recipe>


def _keep_chosen_nulls(section: BaseModel, settings: dict[str, Any]) -> None:
    """Put back each ``None`` that stands against another default: left out, it would come back as that."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _keep_chosen_nulls(value, settings[name])
        elif value is None and field.default is not None:
            settings[name] = None


class Recipe(Section):
    """All settings of a run. ``load_recipe`` puts the chosen method's own config type in ``method``."""

    seed: int = Field(0, ge=0, lt=2**62)
    epochs: int = Field(100, ge=1, le=10**6)
    batch_size: int = Field(256, ge=1, le=10**7)  # images a step, of all ranks and micro-batches together
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: SerializeAsAny[MethodConfig]
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()

    def resolved(self) -> dict[str, Any]:
        """All settings as plain data; ``None`` is left out where it is the default, which depends on others."""
        settings = self.model_dump(mode="json", exclude_none=True)
        _keep_chosen_nulls(self, settings)
        return settings

    def hash(self) -> str:
        """Eight hex digits of all that decides what is trained."""
        settings = self.resolved()
        for key in _ASIDE:
            section, _, name = key.partition(".")
            settings[section].pop(name, None) if name else settings.pop(section, None)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def run_dir(self, stem: str) -> Path:
        return self.run.dir or Path("runs") / f"{stem}-{self.hash()}"


def load_recipe(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Recipe:
    """Read, merge and check a recipe, for a run of this process's ``WORLD_SIZE`` unless another is given.

    Raises:
        RecipeError: anything that would make the run fail or silently mean something else.
    """
    recipe = read_recipe(path, overrides)
    check_combinations(recipe, world_size=world_size or int(os.environ.get("WORLD_SIZE", "1")))
    return recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """As ``load_recipe``, but whether the data is here, and whether the settings go together, is not looked at."""
    return _validate(_merged(_read(path, ()), parse_overrides(overrides)), str(path))


def check_combinations(recipe: Recipe, world_size: int) -> None:
    """Refuse settings that are fine one by one but not together, or not with this data set or number of ranks."""
    engine, batch = recipe.engine, recipe.batch_size
    if engine.zero_stage > 0 and recipe.optim.name == "lars":
        raise RecipeError(
            f"engine.zero_stage={engine.zero_stage} with optim.name=lars: ZeRO hands the optimizer flat shards, LARS"
            " needs whole tensors and would silently be wrong; choose engine.zero_stage=0, or optim.name=sgd or adamw"
        )
    parts = world_size * engine.accumulation
    if batch % parts:
        lower = batch // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise RecipeError(
            f"batch_size={batch} cannot be divided over {world_size} ranks × engine.accumulation="
            f"{engine.accumulation}; the nearest that can: {nearest}"
        )
    if recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError("log.wandb=true, but wandb is not installed: pip install wandb, or set log.wandb=false")
    if recipe.monitor.mine and not recipe.method.embeds_pairs:
        raise RecipeError(
            f"monitor.mine=true compares two views of an image, and method.name={recipe.method.name} embeds one as it"
            " is set; leave monitor.mine out"
        )
    try:
        recipe.method.check_views(recipe.views.resolve())
    except ValueError as error:
        raise RecipeError(str(error)) from error
    _check_against_data(recipe, parts)


def _check_against_data(recipe: Recipe, parts: int) -> None:
    try:
        facts = describe(recipe.data.model_copy(update={"download": False}))
    except DataError as error:
        if recipe.data.download:  # not here yet; the loader checks again
            return
        raise RecipeError(str(error)) from error
    images, batch = facts.counts["pretrain"] or 0, recipe.batch_size
    if batch > images:
        raise RecipeError(
            f"batch_size={batch} is larger than the {images} training images of {facts.source}; at most"
            f" {images // parts * parts}"
        )
    size = recipe.views.size or facts.image_size
    for view in recipe.views.resolve():
        if view.blur and view.kernel(size) // 2 >= size:
            raise RecipeError(
                f"blur_kernel={view.kernel(size)} is too large for views of {size} pixels; at most {2 * size - 1}"
            )
    steps = count_steps(images, batch, recipe.data.last)
    try:
        recipe.method.check(images=images, batch_size=batch, image_size=size)
        build_schedule(recipe.schedule, 1.0, steps, recipe.epochs * steps)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def claim_run_dir(run_dir: Path, recipe: Recipe) -> str | None:
    """Create the run folder with its ``recipe.yaml``, or make sure that an existing one is the same run.

    While there is no checkpoint anything may still change; afterwards only what does not change the training,
    ``engine.accumulation`` (fewer ranks need more of it), and ``epochs``, upwards. Returns a remark for the user, if
    there is one to make.

    Raises:
        RecipeError: the folder holds a run of another recipe (the message lists the differences), or is not usable.
    """
    path = run_dir / "recipe.yaml"
    new = recipe.resolved()
    remark = None
    try:
        if path.exists():
            old = load_yaml(read_text(path, MOST_RECIPE)) or {}
            started = any((run_dir / "checkpoints").glob("step-*"))
            remark = _check_same_run(run_dir, old, new) if started else None
        elif run_dir.exists() and {inside.name for inside in run_dir.iterdir()} - {LOCK, LAUNCH}:
            (run_dir / LOCK).unlink(missing_ok=True)
            raise RecipeError(f"{run_dir} is not empty and holds no recipe.yaml; set run.dir to a new folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        draft = run_dir / ".recipe.yaml.tmp"
        draft.write_text(yaml.safe_dump(new, sort_keys=False))
        draft.replace(path)
    except OSError as error:
        raise RecipeError(f"run.dir={run_dir} cannot be used: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is damaged ({error}); set run.dir to a new folder") from error
    return remark


def _check_same_run(run_dir: Path, old: Any, new: dict[str, Any]) -> str | None:
    changes = [
        (key, before, now)
        for key, before, now in _differences(old, new)
        if key not in ("epochs", "engine.accumulation")
        and not any(key == aside or key.startswith(f"{aside}.") for aside in _ASIDE)
    ]
    if changes:
        lines = "\n".join(f"  {key}: {_told(before)} -> {_told(now)}" for key, before, now in changes)
        raise RecipeError(
            f"{run_dir} holds a run of another recipe:\n{lines}\nset run.dir to a new folder, or take the changes back"
        )
    before, now = old["epochs"] if isinstance(old, dict) and "epochs" in old else None, new["epochs"]
    if type(before) is not int:
        raise RecipeError(f"{run_dir}/recipe.yaml is damaged: epochs={shortened(before)}; set run.dir to a new folder")
    if now < before:
        raise RecipeError(f"epochs={now} is fewer than the {before} of the run in {run_dir}; epochs can only be raised")
    return f"epochs {before} -> {now}: from here on the schedule is that of {now} epochs" if now > before else None


def _told(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 200 else shortened(value)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """["a.b=1", "c=x"] -> {"a": {"b": 1}, "c": "x"}; values are YAML."""
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"{shortened(override)} is not an override; write key.sub=value")
        names = key.split(".")
        if len(names) > MOST_LEVELS:
            raise RecipeError(f"{shortened(override)}: the key has {len(names)} parts, more than {MOST_LEVELS}")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{shortened(override)}: the value is not YAML: {error}") from error
        for name in reversed(names):
            value = {name: value}
        settings = _merged(settings, value)
    return settings


def explain_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each thing that is wrong: the key, the value, and what was expected or is nearest."""
    found = error.errors(include_url=False)
    places = [e["loc"] for e in found]
    # A list whose element is wrong is reported as well, as too short: that says nothing.
    last = [e for e in found if not any(len(p) > len(e["loc"]) > 0 and p[: len(e["loc"])] == e["loc"] for p in places)]
    return "\n".join(_explain(e, model) for e in last)


def _read(path: Path, seen: tuple[Path, ...], merged: dict[Path, dict[str, Any]] | None = None) -> dict[str, Any]:
    """A YAML file merged over those that it extends, if any; ``merged`` holds the files that were read before."""
    merged = {} if merged is None else merged
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, or a name too long
        raise RecipeError(f"{shortened(str(path))} cannot be read: {error}") from error
    if path in seen:
        raise RecipeError(f"{path} extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    if path in merged:  # two bases may share theirs; their number would double with every generation
        return merged[path]
    if len(merged) + len(seen) >= MOST_FILES:
        raise RecipeError(f"{path}: the recipe extends more than {MOST_FILES} files")
    try:
        settings = load_yaml(read_text(path, MOST_RECIPE))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist{_nearest_file(path)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values, not a {type(settings).__name__}")
    extended = settings.pop("extends", None) or []
    bases = [extended] if isinstance(extended, str) else extended
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(
            f"{path}: extends={shortened(extended)} must be the path of another recipe, or a list of paths"
        )
    below: dict[str, Any] = {}
    for base in bases:
        below = _merged(below, _read(path.parent / base, (*seen, path), merged))
    merged[path] = _merged(below, settings)
    return merged[path]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _validate(settings: dict[str, Any], where: str) -> Recipe:
    method = settings.get("method", {})
    if not isinstance(method, dict):
        raise RecipeError(f"{where}: method={shortened(method)} must be a section, such as method.name=simclr")
    method = {"name": "simclr", **method}
    name = method["name"]
    if not isinstance(name, str) or name not in method_names():
        told = shortened(name)
        raise RecipeError(f"{where}: method.name={told} is not known; {_suggest(told.strip(chr(39)), method_names())}")
    config = find_method(name).Config
    model = create_model("Recipe", __base__=Recipe, method=(config, ...))
    try:
        recipe: Recipe = model.model_validate({**settings, "method": method})
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain_errors(error, model)}") from None
    return recipe


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: key, value, what was expected."""
    location = [str(part)[:100] for part in error["loc"]]
    key, value = ".".join(location), shortened(error["input"])
    if error["type"] == "extra_forbidden":
        fields = list(_model_at(model, location[:-1]).model_fields)
        return f"{key}={value}: there is no such key; {_suggest(location[-1], fields)}"
    if error["type"] == "literal_error":
        choices = [str(c) for c in get_args(_annotation_at(model, location))]
        return f"{key}={value}: {_suggest(value.strip(chr(39)), choices) if choices else error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={value}: {message[0].lower()}{message[1:]}"


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The section that a key's location leads to; positions in a list lead nowhere further."""
    for part in location:
        field = model.model_fields.get(part)
        if field is not None:
            model = next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _annotation_at(model: type[BaseModel], location: Sequence[str]) -> Any:
    field = _model_at(model, location[:-1]).model_fields.get(location[-1])
    return field.annotation if field is not None else None


def _suggest(given: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    listed = "choose from " + ", ".join(choices)
    return f"did you mean {close[0]}? ({listed})" if close else listed


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {folder / close[0]}?"
    return f"; there are {', '.join(sorted(names))}" if names else ""


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name, "(unset)"), new.get(name, "(unset)"), inner)
    elif old != new:
        yield key, old, new
