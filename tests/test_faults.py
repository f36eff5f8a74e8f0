"""What goes wrong with data, memory and clocks in mid-run: one readable message, the right exit code, no hang."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from configs.recipe import load_recipe
from tests.distributed import run_ranks
from tests.pipelines.packing import pack, photo_tree
from train import build_run
from trainers.engine import Ranks
from trainers.memory import Need, largest_share
from trainers.pretrain import pretrain

ROOT = Path(__file__).parents[1]
RECIPE = """
epochs: {epochs}
batch_size: 16
data: {{source: folder, root: {root}, holdout: 0.0, workers: 2}}
views: {{plan: simclr_cifar, size: 16}}
encoder: {{arch: resnet8x4}}
method: {{name: simclr, projector: {{hidden: 32, output: 16}}}}
schedule: {{warmup_epochs: 0}}
monitor: {{every_epochs: 10000}}
checkpoint: {{every_epochs: 1}}
"""
DIGITS = """
epochs: 4
batch_size: 32
data: {source: digits, limit: 160}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, projector: {hidden: 32, output: 16}}
schedule: {warmup_epochs: 1}
checkpoint: {every_epochs: 0.4}
log: {every_steps: 5}
"""


def recipe_of(folder: Path, root: Path, epochs: int = 10000) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(root=root, epochs=epochs))
    return path


class Training:
    """`train.py` in a process of its own, stopped at the latest when the test ends."""

    def __init__(self, recipe: Path, run_dir: Path, *overrides: str) -> None:
        self.run_dir = run_dir
        command = [sys.executable, str(ROOT / "train.py"), str(recipe), f"run.dir={run_dir}", *overrides]
        self.process = subprocess.Popen(
            command, cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 200
        while not list(self.run_dir.glob("checkpoints/step-*")):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        """(exit code, what it said on stderr that is not a warning's)."""
        _, said = self.process.communicate(timeout=200)
        return self.process.returncode, said

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def only_error(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize("victims", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_a_killed_data_worker_ends_the_run_with_a_message(victims: str, tmp_path: Path) -> None:
    photo_tree(tmp_path / "images", {"one": 24, "two": 24}, sides=(24, 30))
    recipe = recipe_of(tmp_path, tmp_path / "images")
    with Training(recipe, tmp_path / "run", "data.loader=plain") as training:
        training.wait_for_checkpoint()
        below = psutil.Process(training.process.pid).children(recursive=True)
        workers = [child for child in below if not child.children() and len(child.cmdline()) > 1]
        workers = [child for child in workers if "forkserver" in " ".join(child.cmdline())]
        assert len(workers) == 2, [child.cmdline() for child in below]
        for worker in workers[: {"one": 1, "all": 2}[victims]]:
            worker.send_signal(signal.SIGKILL)
        code, said = training.ended()
    assert code == 1, said
    assert "a process that decodes images died" in only_error(said)
    assert "memory" in only_error(said)


def test_a_shard_cut_off_in_mid_run_and_another_set_at_the_next_start(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "images", {"one": 24, "two": 24}, sides=(24, 30))
    pack(config, tmp_path / "packed", to="ffcv")
    shard = tmp_path / "packed/train.beton"
    whole = shard.read_bytes()
    recipe = recipe_of(tmp_path, tmp_path / "packed")
    with Training(recipe, tmp_path / "run", "data.loader=ffcv") as training:
        training.wait_for_checkpoint()
        os.truncate(shard, len(whole) // 2)
        code, said = training.ended()
    assert code == 1, said
    assert str(shard) in only_error(said)

    shard.write_bytes(whole)
    other = photo_tree(tmp_path / "others", {"one": 24, "two": 24}, sides=(24, 36))
    pack(other, tmp_path / "other", to="ffcv")
    with Training(recipe, tmp_path / "run", "data.loader=ffcv", f"data.root={tmp_path / 'other'}") as resumed:
        code, said = resumed.ended()
    assert code == 2, said
    assert "was trained on other images than folder now has, though as many" in only_error(said)


def with_a_broken_clock(group: dist.ProcessGroup, recipe: Path, directory: Path) -> int:
    """The whole run with a clock that falls back by an hour at each look, and files that date from the future."""
    fallen = itertools.count()
    clock = time.time
    time.time = lambda: clock() - 3600 * next(fallen)
    directory.mkdir()
    (directory / "recipe.yaml").write_text(recipe.read_text())
    run = build_run(load_recipe(recipe), directory, Ranks(0, 1, torch.device("cpu"), None, None))
    write = run.log.write_step

    def touched(step: int, epoch: float, lr: float) -> dict[str, float]:
        for age, path in enumerate(sorted(directory.glob("checkpoints/step-*"))):
            os.utime(path, (4e9 - age, 4e9 - age))
        return write(step, epoch, lr)

    run.log.write_step = touched  # type: ignore[method-assign]
    try:
        return pretrain(run)
    finally:
        time.time = clock


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(DIGITS)
    assert run_ranks(1, with_a_broken_clock, recipe, tmp_path / "run") == [0]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [5, 10, 15, 20]
    assert all(row["time/images_per_second"] > 0 and 0 <= row["time/data_wait"] <= 1 for row in training)
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [f"step-{n:08d}" for n in (16, 18, 20)]
    assert (checkpoints / "last").resolve().name == "step-00000020"


def test_the_largest_share_is_the_largest_that_fits() -> None:
    for fixed, each, views, share, parts, budget in itertools.product(
        (0, 50), (1, 7), (0, 2), (32, 48), (1, 2, 4), (10, 60, 100, 170, 10_000)
    ):
        need = Need(fixed, each, views)
        fits = largest_share(need, budget, share, parts)
        assert fits % parts == 0
        assert fits == 0 or need.of(fits, parts) <= budget
        if fits < share:
            step = parts * 8 if fits >= parts * 8 else parts
            assert need.of(fits + step, parts) > budget


HUNGRY = """
epochs: 1
batch_size: 160
data: {source: digits, limit: 160, loader: resident}
views: {plan: digits, size: 32}
encoder: {arch: resnet8x4}
method: {name: simclr, projector: {hidden: 32, output: 16}}
optim: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 0}
monitor: {every_epochs: 1}
"""


def limited(recipe: Path, run_dir: Path, megabytes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.limited", str(megabytes), str(recipe), f"run.dir={run_dir}", *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_out_of_memory_names_a_batch_that_fits(tmp_path: Path) -> None:
    recipe = tmp_path / "hungry.yaml"
    recipe.write_text(HUNGRY)
    failed = limited(recipe, tmp_path / "whole", 300)
    assert failed.returncode == 1, failed.stderr
    message = only_error(failed.stderr)
    assert "out of memory on cpu when " in message
    assert "the process (ulimit -d) has " in message
    assert "the batch is 160 images a rank" in message
    named = int(message.partition("batch_size=")[2].partition(" ")[0])
    parts = int(message.partition("engine.accumulation=")[2].partition(";")[0])
    assert 8 <= named < 80, "300 MB hold about 50 of these"
    assert 160 % parts == 0
    fits = limited(recipe, tmp_path / "fits", 300, f"batch_size={named}")
    assert fits.returncode == 0, fits.stderr


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [150, 300, 500])
def test_the_named_accumulation_fits_as_well(megabytes: int, tmp_path: Path) -> None:
    recipe = tmp_path / "hungry.yaml"
    recipe.write_text(HUNGRY)
    message = only_error(limited(recipe, tmp_path / "whole", megabytes).stderr)
    parts = int(message.partition("engine.accumulation=")[2].partition(";")[0])
    named = int(message.partition("batch_size=")[2].partition(" ")[0])
    for number, change in enumerate((f"engine.accumulation={parts}", f"batch_size={named}")):
        fits = limited(recipe, tmp_path / str(number), megabytes, change)
        assert fits.returncode == 0, (change, fits.stderr)


@pytest.mark.slow
def test_an_exploding_learning_rate_ends_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(DIGITS)
    options = ("optim.name=sgd", "optim.lr=1e38", "optim.lr_scaling=none", "schedule.warmup_epochs=0")
    with Training(recipe, tmp_path / "run", *options) as training:
        code, said = training.ended()
    assert code == 1, said
    assert "are not" in only_error(said)
    assert len(list((tmp_path / "run/nonfinite").iterdir())) == 1
    for file in (tmp_path / "run").glob("checkpoints/step-*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point())
