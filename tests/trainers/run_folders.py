"""Run folders as pretraining leaves them, without the pretraining."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from configs.recipe import load_recipe
from pipelines.plain_views import plain_batches
from pipelines.sources import open_source
from tests.trainers.small_runs import facts
from trainers.dropout import dropout_rate
from trainers.encoders import build_encoder
from trainers.engine import Ranks
from trainers.methods import BaseMethod, build_method
from trainers.state import RunState, save_checkpoint

SMALL = {
    "epochs": 2,
    "batch_size": 64,
    "data": {"source": "digits"},
    "views": {"plan": "digits"},
    "encoder": {"arch": "resnet8x4"},
    "optim": {"name": "sgd", "lr": 0.1},
    "schedule": {"warmup_epochs": 0},
}


def write_run(folder: Path, method: dict[str, Any], step: int = 18, **changes: Any) -> BaseMethod:
    """A run on the digits with a checkpoint of an untrained method, but for BatchNorm's statistics; returns it."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL | {"method": method} | changes))
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    source = open_source(recipe.data, "pretrain")
    torch.manual_seed(0)
    given = facts(
        plan=recipe.views.resolve(), mean=source.mean, std=source.std, images=len(source), classes=10, steady=False
    )
    built = build_method(recipe.method, build_encoder(recipe.encoder, 8), given)
    images, _ = next(plain_batches(source, 8, 64, torch.device("cpu")))
    for module in built.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        built.embed(images.expand(2, *images.shape))
    about = {
        "arch": recipe.encoder.arch,
        "stem": recipe.encoder.stem,
        "image_size": 8,
        "mean": source.mean,
        "std": source.std,
        "dropout": dropout_rate(built.encoder),
    }
    values = {"images": len(source), "encoder": about, "recipe": (folder / "recipe.yaml").read_text()}
    state = RunState(step, {"method": dict(built.state_dict())}, values=values)
    save_checkpoint(folder, state, Ranks(0, 1, torch.device("cpu"), None, None), keep=3)
    return built.eval()
