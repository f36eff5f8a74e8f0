"""The smallest runs of ``train.py``, and what two of them must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.forked import finished, start_training

EVERY = 2
RECIPE = f"""
epochs: 15
batch_size: 16
data: {{source: digits, limit: 64, holdout: 0.25}}
views: {{plan: digits, size: 8}}
encoder: {{arch: resnet8x4}}
method: {{name: simclr, projector: {{hidden: 16, output: 8}}}}
optim: {{name: sgd, lr: 0.1}}
schedule: {{warmup_epochs: 1}}
monitor: {{every_epochs: 2, images: 32}}
checkpoint: {{every_epochs: null, every_steps: {EVERY}}}
log: {{every_steps: 1}}
"""


def written_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed, nor the line that a kill cut short."""
    path = run_dir / "metrics.jsonl"
    whole = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in whole]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    last = run_dir / "checkpoints/last"
    return {f"{f.name}/{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = final_tensors(found), final_tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert rows(found) == rows(expected)


def train(recipe: Path, run_dir: Path, *overrides: str, code: int = 0, output: Path | None = None) -> str:
    """A run to its end; returns what it printed."""
    output = output or run_dir.with_suffix(".log")
    start = output.stat().st_size if output.exists() else 0
    process = start_training([recipe, f"run.dir={run_dir}", *overrides], output)
    try:
        found = finished(process, 1200)
    finally:
        process.kill()
    printed = output.read_bytes()[start:].decode()
    assert found == code, printed[-3000:]
    assert "Traceback" not in printed
    return printed
