"""The training loop never waits for the device but where the log is written: counted for every method."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.recipe import load_recipe
from tests.trainers.counted_waits import EVERY, RECIPE, STEPS
from train import build_run
from trainers.engine import Ranks
from trainers.methods import method_names
from trainers.pretrain import pretrain

# Where a GPU runs a Triton kernel, the simulated device runs the CPU's search, which looks at what it found.
OF_THE_CPU = ("kernels/nearest_cpu.py", "kernels/kmeans.py")
TABLES = ("trainers/parts/representations/scattering.py", "kernels/photometric_reference.py")  # made once
AT_AN_INTERVAL = {"trainers/nonfinite.py": 1, "trainers/runlog.py": 2}  # two where a scalar is known from then on only
SMALL = ["method.projector.hidden=16", "method.projector.output=8"]
QUICK = {
    "simclr": ["method.name=simclr", *SMALL],
    "nnclr": ["method.name=nnclr", "method.queue_size=16", *SMALL],
}
OTHERS = {
    "lars, clipped": ["method.name=simclr", "optim.name=lars", "engine.gradient_clipping=1", *SMALL],
    "adamw, two micro-batches, MINE": ["method.name=simclr", "optim.name=adamw", "engine.accumulation=2",
                                       "monitor.mine=true", *SMALL],
    "avgsimclr": ["method.name=avgsimclr", "views.repeat=2", *SMALL],
    "beclr": ["method.name=beclr", "method.loss=margin", *SMALL],
    "kmclr": ["method.name=kmclr", "method.centres=4", *SMALL],
    "mvmr": ["method.name=mvmr", "views.plan=mvmr_cifar", *SMALL],
    "probsimclr": ["method.name=probsimclr", "method.dropout=0.1", *SMALL],
}  # fmt: skip


def counted(cases: dict[str, list[str]]) -> dict[str, Any]:
    pytest.importorskip("torch.utils.backend_registration")
    script = Path(__file__).with_name("counted_waits.py")
    command = [sys.executable, str(script), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(name: str, steps: list[list[list[str]]]) -> None:
    assert len(steps) == STEPS
    for number, waits in enumerate(steps, start=1):
        ignored = (*OF_THE_CPU, *(TABLES if number == 1 else ()))
        places = [place.partition(":")[0] for place, _ in waits if not place.startswith(ignored)]
        allowed = AT_AN_INTERVAL if number % EVERY == 0 else {}
        for place in set(places):
            assert places.count(place) <= allowed.get(place, 0), f"{name}, step {number}: {waits}"
        if number % EVERY == 0:  # that it can count
            assert "trainers/runlog.py" in places


def test_nothing_waits_between_two_rows_of_the_log() -> None:
    for name, found in counted(QUICK).items():
        check(name, found["steps"])


@pytest.mark.slow
def test_no_other_method_or_setting_waits() -> None:
    taught = {"clipdistill"}  # needs a teacher's weights
    assert {case[0].removeprefix("method.name=") for case in (QUICK | OTHERS).values()} | taught == set(method_names())
    for name, found in counted(OTHERS).items():
        check(name, found["steps"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_cuda_agrees(name: str, tmp_path: Path) -> None:
    """CUDA itself counts: an error at the first wait, but for the two reads of an interval."""
    # In a process of its own: the tests' processes tell DeepSpeed to stay on the CPU.
    code = "import sys; from tests.trainers.test_waits import under_cuda; under_cuda(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(tmp_path)],
        cwd=Path(__file__).parents[2], env=os.environ | {"DS_ACCELERATOR": "cuda"},
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def under_cuda(name: str, folder: str) -> None:
    """Train with a row every 8; every wait from the first row on is an error, but in the steps of rows."""
    import torch.distributed as dist

    every, device = 8, torch.device("cuda", 0)
    path, directory = Path(folder, "recipe.yaml"), Path(folder, "run")
    path.write_text(RECIPE.replace("epochs: 2", "epochs: 8") + f"log: {{every_steps: {every}}}\n")
    directory.mkdir()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    run = build_run(load_recipe(path, (QUICK | OTHERS)[name]), directory, Ranks(0, 1, device, None, None))
    run.monitor.holdout = None
    add, write, steps, checked = run.log.add, run.log.write_step, 0, 0

    def added(*given: Any) -> None:
        nonlocal steps, checked
        add(*given)
        steps += 1
        checked += torch.cuda.get_sync_debug_mode() == 2
        if steps % every == every - 1:  # the next step ends in a row
            torch.cuda.set_sync_debug_mode("default")

    def written(*given: Any) -> dict[str, float]:
        row = write(*given)
        if steps < run.log.total_steps:  # before the first row kernels are compiled, after the last the run is saved
            torch.cuda.set_sync_debug_mode("error")
        return row

    run.log.add, run.log.write_step = added, written  # type: ignore[method-assign]
    assert pretrain(run) == 0
    assert steps == run.log.total_steps
    assert checked == (steps // every - 1) * (every - 1) > 0
