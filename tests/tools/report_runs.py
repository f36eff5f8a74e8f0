"""Run folders as training leaves them, made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import yaml

from configs.recipe import load_recipe
from pipelines.sources import open_source
from trainers.encoders import EncoderConfig, build_encoder
from trainers.engine import Ranks
from trainers.state import RunState, save_checkpoint

RECIPE = {
    "epochs": 2,
    "batch_size": 8,
    "views": {"plan": "digits", "size": 8},
    "encoder": {"arch": "resnet8x4"},
    "method": {"name": "simclr", "projector": {"hidden": 16, "output": 8}},
    "optim": {"name": "sgd", "lr": 0.5},
    "schedule": {"warmup_epochs": 1},
}
DIGITS = {"source": "digits", "limit": 120, "holdout": 0.03}
ROWS = (
    {"step": 1, "epoch": 0.5, "train/loss": 6.0, "train/lr": 0.1, "train/own<b>figure</b>": 1.0},
    {"step": 2, "epoch": 1.0, "train/loss": 5.0, "train/lr": 0.2, "train/own<b>figure</b>": 2.0},
    {
        "step": 2,
        "epoch": 1.0,
        "holdout/feature_std": 0.5,
        "holdout/effective_rank": 9.0,
        "holdout/knn_k20_t0.07": 71.25,
    },
)


def make_run(
    path: Path,
    data: Mapping[str, Any] = DIGITS,
    *,
    rows: Sequence[Mapping[str, Any]] = ROWS,
    checkpoint: bool = True,
    **changes: Any,
) -> Path:
    """A run folder with recipe, metrics and (an untrained encoder's) checkpoint."""
    path.mkdir(parents=True)
    written = path / "recipe.yaml"
    written.write_text(yaml.safe_dump(RECIPE | {"data": dict(data)} | changes))
    recipe = load_recipe(written)
    written.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint:
        source = open_source(recipe.data, "pretrain")
        size = recipe.views.size or source.image_size
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(arch="resnet8x4"), size)
        tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        about = {"arch": "resnet8x4", "stem": "auto", "image_size": size, "mean": source.mean, "std": source.std}
        state = RunState(2, {"method": tensors}, values={"encoder": about})
        save_checkpoint(path, state, Ranks(0, 1, torch.device("cpu"), None, None), keep=1)
    return path


def add_record(run: Path, name: str = "knn-digits-all-0", **values: Any) -> None:
    """An evaluation's record beside a run."""
    record = {
        "protocol": "knn",
        "metric": "top1",
        "value": 87.654,
        "interval_low": 80.0,
        "interval_high": 93.0,
        "n_test": 360,
        "data": "digits",
        "encoder": "x (step-00000002)",
        "description": "bank: 120 images",
        "table": [{"labels": "120", "test top-1 (%)": "87.65"}],
        "pictures": {},
        "warnings": [],
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / f"{name}.json").write_text(json.dumps(record | values))


class Seen(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        self._inside = name

    def handle_endtag(self, name: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]
