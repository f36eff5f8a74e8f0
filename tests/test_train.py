"""``train.py`` as a user runs it: killed, stopped, resumed, started twice, over two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainers.encoders import EncoderConfig, build_encoder
from trainers.state import locked

ROOT = Path(__file__).parents[1]
RECIPE = """
epochs: 4
batch_size: 32
data: {source: digits, limit: 160}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, projector: {hidden: 32, output: 16}}
optim: {name: lars, lr: 1.0}
schedule: {warmup_epochs: 1}
monitor: {every_epochs: 1}
checkpoint: {every_epochs: 0.4}
log: {every_steps: 3}
"""  # 5 steps an epoch, 20 in all; a checkpoint every 2; rows every 3


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), str(recipe), f"run.dir={run_dir}", *overrides]


def run(recipe: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, run_dir, *overrides),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def interrupt(recipe: Path, run_dir: Path, after_checkpoint: int, number: signal.Signals) -> int:
    """Send a signal once the checkpoint of that step is there; returns the exit code."""
    process = subprocess.Popen(command(recipe, run_dir), cwd=recipe.parent, stdout=subprocess.DEVNULL)
    try:
        target = run_dir / f"checkpoints/step-{after_checkpoint:08d}"
        deadline = time.monotonic() + 150
        while not target.exists():
            assert process.poll() is None, "the run ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)  # into the next step
        process.send_signal(number)
        return process.wait(100)
    finally:
        process.kill()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    last = run_dir / "checkpoints/last"
    return {f"{f.name}/{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_killed_and_stopped_runs_end_bit_identical(recipe: Path, tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = run(recipe, calm)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    assert "ETA" in done.stdout

    assert interrupt(recipe, rough, 6, signal.SIGKILL) == -signal.SIGKILL  # in mid-epoch: an epoch is 5 steps
    assert interrupt(recipe, rough, 12, signal.SIGTERM) == 75
    resumed = run(recipe, rough)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout

    expected, got = final_tensors(calm), final_tensors(rough)
    assert expected.keys() == got.keys()
    assert any("momentum_buffer" in name for name in got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert rows(calm) == rows(rough)
    steps = [row["step"] for row in rows(calm) if "train/loss" in row]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    assert all("epoch" in row for row in rows(calm))
    assert {row["step"] for row in rows(calm) if "holdout/knn_k20_t0.07" in row} == {5, 10, 15, 20}

    again = run(recipe, rough)  # a finished run is left as it is
    assert again.returncode == 0
    assert final_tensors(rough).keys() == expected.keys()

    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 8)
    encoder.load_state_dict(load_file(rough / "encoder.safetensors"), strict=True)
    assert list((rough / "tensorboard").iterdir())

    changed = run(recipe, rough, "optim.lr=0.5")
    assert changed.returncode == 2
    assert "optim.lr: 1.0 -> 0.5" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_a_run_over_two_ranks_follows_the_run_of_one(recipe: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    overrides = ["epochs=2", "optim.name=sgd", "optim.lr=0.2", "method.temperature=0.5"]
    two = subprocess.run(
        launcher + command(recipe, tmp_path / "two", *overrides)[1:],
        cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False, env=environment,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(recipe, tmp_path / "one", *overrides)
    assert one.returncode == 0, one.stderr[-3000:]
    losses = [[row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == 4
    # float32 and synchronised BatchNorm: see test_engine.py for what is equal to the last digits
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing.yaml"], "does not exist"),
        (["tiny.yaml", "epohcs=3"], "did you mean epochs?"),
        (["tiny.yaml", "data.source=cifar10", "data.limit=null", "data.root=empty"], "data.download=true"),
    ],
)
def test_mistakes_end_in_one_readable_message(recipe: Path, arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=recipe.parent, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_a_run_folder(recipe: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        second = run(recipe, tmp_path / "run")
    assert second.returncode == 2
    assert "in use by another process" in second.stderr
    assert not (tmp_path / "run/recipe.yaml").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"")
    foreign = run(recipe, tmp_path / "photos")
    assert foreign.returncode == 2
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"], "somebody's folder is left alone"
