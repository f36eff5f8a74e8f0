"""A method as a run left it, heads and all: for evaluations that need more than the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from pipelines.foreign import MOST_RECIPE, load_json, load_yaml, read_text
from pipelines.order import count_steps
from pipelines.sources import DataConfig, describe
from pipelines.views import ViewsConfig
from trainers.encoders import EncoderConfig, build_encoder
from trainers.methods import BaseMethod, Facts, MethodConfig, build_method, find_method, method_names
from trainers.state import CheckpointError, damage_named, find_checkpoint, load_strict
from trainers.weights import check_state, image_facts, load_tensors


def method_config(run: Path) -> MethodConfig:
    """What ``method`` was in the recipe of a run, with the type of that method.

    Raises:
        CheckpointError: not a run folder, or its recipe is damaged.
    """
    return _method_of(_recipe(run), run)


def load_method(run: Path, step: int | None = None) -> BaseMethod:
    """The whole method of a run's newest whole checkpoint, or of that of a step; in evaluation mode, without gradients.

    What it can only know in training (a teacher's remembered outputs) starts empty.

    Raises:
        CheckpointError: there is no such checkpoint, or its tensors are not exactly those of the recipe's method.
        DataError: the data of the run cannot be counted, or a teacher is not at hand.
    """
    recipe = _recipe(run)
    checkpoint = find_checkpoint(run) if step is None else run / "checkpoints" / f"step-{step:08d}"
    if checkpoint is None or not checkpoint.exists():
        raise CheckpointError(f"{run} has no whole checkpoint{'' if step is None else f' of step {step}'}")
    try:
        state = check_state(load_json(read_text(checkpoint / "state.json")))
        data = DataConfig.model_validate(recipe["data"])
        views = ViewsConfig.model_validate(recipe["views"])
        about, images, batch = state["encoder"], int(state["images"]), int(recipe["batch_size"])
        size, mean, std = image_facts(about)
        encoder = EncoderConfig(arch=about["arch"], stem=about["stem"])
        steps = count_steps(images, batch, data.last)
        total, seed = int(recipe["epochs"]) * steps, int(recipe["seed"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} or its run's recipe.yaml is damaged: {reason}") from error
    facts = Facts(
        image_size=size,
        mean=mean,
        std=std,
        images=images,
        classes=describe(data).num_classes,
        multi_label=False,
        seed=seed,
        batch_size=batch,
        steps_per_epoch=steps,
        total_steps=total,
        plan=views.resolve(),
        steady=False,
    )
    with torch.random.fork_rng(devices=()):  # the weights drawn are overwritten
        method = build_method(_method_of(recipe, run), build_encoder(encoder, size), facts)
    with damage_named(checkpoint):
        tensors = load_tensors(checkpoint / "method.safetensors")
    load_strict(method, tensors, f"{checkpoint}/method.safetensors")
    return method.eval().requires_grad_(False)


def _recipe(run: Path) -> dict[str, Any]:
    path = run / "recipe.yaml"
    try:
        recipe = load_yaml(read_text(path, MOST_RECIPE))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping of keys to values")
    return recipe


def _method_of(recipe: dict[str, Any], run: Path) -> MethodConfig:
    try:
        settings = recipe["method"]
        if settings["name"] not in method_names():
            raise ValueError(f"method.name={settings['name']!r} is not known")
        kind: type[MethodConfig] = find_method(settings["name"]).Config
        config = kind.model_validate(settings)
    except (KeyError, TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{run}/recipe.yaml: its method section is damaged: {detail}") from error
    return config
