"""``train.py`` killed at random moments, stopped at awkward ones, on full and read-only disks, started twice."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import finished, start_training, wait_until
from trainers.state import damage, find_checkpoint

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


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
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


def train(recipe: Path, run_dir: Path, *overrides: str, code: int = 0) -> str:
    """A run to its end; returns what it printed."""
    output = run_dir.with_suffix(".log")
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


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_killed_at_random_moments(recipe: Path, tmp_path: Path, kills: int) -> None:
    """One chain of runs, each resuming what the killed one left, ends with the undisturbed run's bits and rows."""
    seed = int(os.environ.get("TWINSTREAM_KILL_SEED") or random.randrange(10**6))
    print(f"TWINSTREAM_KILL_SEED={seed}")  # pytest shows it if the test fails
    chance = random.Random(seed)
    epochs = f"epochs={2 * kills}"
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    train(recipe, calm, epochs)
    moments: dict[str, int] = {}
    for number in range(kills):
        kind = (
            ["start", "write", "step"][number]
            if number < 3
            else chance.choices(["start", "write", "step"], [1, 3, 2])[0]
        )
        background = chance.random() < 0.5
        kind = _kill(recipe, rough, kind, chance, epochs, f"checkpoint.background={str(background).lower()}")
        moments[kind] = moments.get(kind, 0) + 1
        print(f"kill {number}: {kind}, background {background}")
        whole = find_checkpoint(rough)
        seen = max((row["step"] for row in rows(rough)), default=0)
        if (rough / "checkpoints/last").is_symlink():
            assert damage(rough / "checkpoints/last") is None
        # A row is written before its step's checkpoint; written beside the loop, that before it may be under way.
        least = (seen - 1) // EVERY * EVERY if not background else (seen // EVERY - 1) * EVERY
        assert (int(whole.name[5:]) if whole else 0) >= max(0, least), f"{whole} after step {seen}"
    assert sum(moments.values()) == kills
    assert moments["write"] >= 1
    train(recipe, rough, epochs)
    check_same(rough, calm)
    print(f"{kills} kills: {moments}")


def _kill(recipe: Path, run_dir: Path, kind: str, chance: random.Random, *overrides: str) -> str:
    """Start the run and kill it; returns in which moment of its life it was hit."""
    before = len(rows(run_dir))
    process = start_training([recipe, f"run.dir={run_dir}", *overrides], run_dir.with_suffix(".log"))
    checkpoints = run_dir / "checkpoints"
    try:
        if kind == "start":
            time.sleep(chance.uniform(0, 1))
        elif kind == "write":
            old = {path.name for path in checkpoints.glob(".step-*")}
            wait_until(lambda: {path.name for path in checkpoints.glob(".step-*")} - old, process)
            time.sleep(chance.uniform(0, 0.03))
        else:
            first = rows(run_dir)[-1:]
            wait_until(lambda: len(rows(run_dir)) > before or rows(run_dir)[-1:] != first, process)
            time.sleep(chance.uniform(0, 0.3))
        assert process.is_alive(), run_dir.with_suffix(".log").read_text()[-3000:]
    finally:
        process.kill()
        process.join()
    drafts = list(checkpoints.glob(".step-*"))
    return "write" if drafts else kind if kind == "start" else "step"
