"""Runs that read from the disk as they train: killed in mid-epoch, they go on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.sources import DataConfig
from tests.pipelines.stored_sets import write_photos
from tests.test_train import ROOT, command, final_tensors, interrupt, rows, run

RECIPE = """
epochs: 3
batch_size: 8
data: {{source: folder, root: {root}, holdout: 0.1, {loader}}}
views: {{plan: simclr, size: 32}}
encoder: {{arch: resnet8x4}}
method: {{name: simclr, projector: {{hidden: 32, output: 16}}}}
optim: {{name: sgd, lr: 0.1}}
schedule: {{warmup_epochs: 1}}
monitor: {{every_epochs: 1}}
checkpoint: {{every_epochs: 0.4}}
log: {{every_steps: 2}}
"""  # 80 images, 8 of them held out: 9 steps an epoch, a checkpoint every 4


@pytest.mark.parametrize(
    "loader",
    [
        "loader: ffcv, order: quasi_random, os_cache: false",
        pytest.param("loader: dali, reader: dali", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bit_identical(loader: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 80)
    if "ffcv" in loader:
        convert(gather(DataConfig(source="folder", root=photos), None)[0], tmp_path / "packed", Options(), workers=0)
        photos = tmp_path / "packed"
    else:
        pytest.importorskip("nvidia.dali")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(root=photos, loader=loader))
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = run(recipe, calm)
    assert done.returncode == 0, done.stderr
    assert "data wait" in done.stdout
    assert interrupt(recipe, rough, 12, signal.SIGKILL) == -signal.SIGKILL  # in the second epoch
    resumed = run(recipe, rough, "data.workers=1", "data.ahead=1")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    expected, got = final_tensors(calm), final_tensors(rough)
    own_state = {name for name in expected if name.startswith("loader")}
    assert bool(own_state) == ("reader" in loader)
    assert [n for n in expected if n not in own_state and not torch.equal(expected[n], got[n])] == []
    assert rows(calm) == rows(rough)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)]
)
def test_plains_processes_end_with_the_run(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Killed, it takes them along; a signal to the whole group, as Ctrl-C sends one, is still the run's to answer."""
    write_photos(tmp_path / "photos", 80)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path / "photos", loader="loader: plain, workers: 2") + "run: {dir: run}\n")
    process = psutil.Popen(
        command(recipe, tmp_path / "run"), cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 150
        while not (tmp_path / "run/checkpoints/step-00000004").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        below = process.children(recursive=True)
        assert len(below) >= 3, "the server and two workers"
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(60) == code
        gone, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
        assert gone
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_loader_that_is_not_there_is_a_readable_refusal(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 20)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path / "photos", loader="loader: ffcv"))
    refused = run(recipe, tmp_path / "run")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: data.loader=ffcv reads .beton files")
    assert "Traceback" not in refused.stderr


def test_a_program_that_never_closes_the_plain_loader_ends(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 20)
    script = tmp_path / "program.py"
    script.write_text(f"""
import torch
from pathlib import Path
from pipelines.plain import PlainLoader
from pipelines.sources import DataConfig, open_source
from pipelines.views import View
if __name__ == "__main__":
    source = open_source(DataConfig(source="folder", root=Path({str(tmp_path / "photos")!r}), holdout=0), "pretrain")
    loader = PlainLoader(source, (View(),), size=8, batch_size=5, seed=0, device=torch.device("cpu"))
    steps = loader.epoch(0)
    next(steps)
""")
    done = subprocess.run([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0
