"""Nothing grows in a long run: memory, open files, threads and processes, and what lies in the run folder."""

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from configs.recipe import load_recipe
from tests.distributed import run_ranks
from tests.pipelines.packing import pack, photo_tree
from train import build_run
from trainers.engine import Ranks
from trainers.pretrain import pretrain

RECIPE = """
epochs: {epochs}
batch_size: 16
views: {{plan: simclr_cifar, size: 8}}
encoder: {{arch: resnet8x4}}
method: {{name: simclr, projector: {{hidden: 32, output: 16}}}}
schedule: {{warmup_epochs: 1}}
monitor: {{every_epochs: 1, mine: true}}
checkpoint: {{every_epochs: 1}}
log: {{every_steps: 2}}
"""
# Bytes an epoch. What this is to find (a batch of views, a checkpoint's tensors, an evaluation's bank) is 100 kB and
# more; a heap that settles was seen to take up to 20. In a short run its jumps of 1 to 2 MB count for more than that.
MOST_GROWTH, JUMPS = 40_000, 4_000_000


def sampled(group: dist.ProcessGroup, recipe: Path, directory: Path, overrides: list[str]) -> dict[str, list[int]]:
    """A run from end to end in one process, and what it held after the evaluation of each epoch."""
    directory.mkdir()
    (directory / "recipe.yaml").write_text(recipe.read_text())
    run = build_run(load_recipe(recipe, overrides), directory, Ranks(0, 1, torch.device("cpu"), None, None))
    process, evaluate = psutil.Process(), run.monitor.evaluate
    held: dict[str, list[int]] = {"rss": [], "files": [], "threads": [], "children": [], "written": []}

    def observed(*about: Any) -> dict[str, float] | None:
        scores = evaluate(*about)
        gc.collect()  # what waits to be collected is no leak, nor is what the allocator keeps for later
        ctypes.CDLL(None).malloc_trim(0)
        held["rss"].append(process.memory_info().rss)
        held["files"].append(process.num_fds())
        held["threads"].append(process.num_threads())
        held["children"].append(len(process.children(recursive=True)))
        held["written"].append(sum(len(files) for _, _, files in os.walk(directory)))
        return scores

    run.monitor.evaluate = observed  # type: ignore[method-assign]
    assert pretrain(run) == 0
    return held


def quarters(values: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The second and the last; the first is for caches to fill."""
    length = len(values) // 4
    return np.array(values[length : 2 * length]), np.array(values[-length:])


def check_flat(held: dict[str, list[int]]) -> None:
    epochs = len(held["rss"])
    for name in ("files", "threads", "children", "written"):
        before, after = quarters(held[name])
        assert after.max() <= before.max(), f"{name}: up to {before.max()}, then up to {after.max()}: {held[name]}"
    before, after = quarters(held["rss"])
    span = epochs * 5 / 8  # epochs between the middles of the two
    growth = (np.median(after) - np.median(before)) / span
    assert growth < max(MOST_GROWTH, JUMPS / span), f"{growth:,.0f} bytes an epoch: {held['rss']}"
    print(f"{epochs} epochs: {growth:,.0f} bytes an epoch, {held['files'][-1]} files, {held['threads'][-1]} threads")


def soak(folder: Path, epochs: int, data: str) -> None:
    recipe = folder / "soak.yaml"
    recipe.write_text(RECIPE.format(epochs=epochs) + f"data: {data}\n")
    overrides: list[str] = []
    [held] = run_ranks(1, sampled, recipe, folder / "run", overrides, timeout=3000)
    assert len(held["rss"]) == epochs
    check_flat(held)


@pytest.mark.slow
def test_forty_epochs_are_flat(tmp_path: Path) -> None:
    soak(tmp_path, 40, "{source: digits, limit: 32, holdout: 0.03, loader: resident}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_epochs_are_flat(tmp_path: Path) -> None:
    soak(tmp_path, 200, "{source: digits, limit: 64, holdout: 0.03, loader: resident}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loader", ["native", "plain", "ffcv", "dali"])
def test_every_loader_is_flat(loader: str, tmp_path: Path) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config: Any = photo_tree(tmp_path / "images", {"one": 20, "two": 20}, sides=(24, 30))
    root = tmp_path / "images"
    if loader == "ffcv":
        pack(config, tmp_path / "packed", to="ffcv")
        root = tmp_path / "packed"
    soak(tmp_path, 60, f"{{source: folder, root: {root}, holdout: 0.2, loader: {loader}, workers: 2}}")


def test_a_leak_would_be_seen() -> None:
    flat = {"rss": [10**9] * 40, "files": [20] * 40, "threads": [8] * 40, "children": [0] * 40, "written": [30] * 40}
    check_flat(flat)
    for name, step in (("rss", 200_000), ("files", 1), ("threads", 1), ("children", 1), ("written", 1)):
        with pytest.raises(AssertionError, match=name if name != "rss" else "bytes an epoch"):
            check_flat(flat | {name: [value + step * epoch for epoch, value in enumerate(flat[name])]})
