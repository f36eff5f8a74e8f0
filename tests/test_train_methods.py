"""Every method as a user runs it: killed in mid-epoch and resumed, it ends with the bits of the undisturbed run."""

import signal
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_train import final_tensors, interrupt, rows, run

COMPARED = Path(__file__).parents[1] / "configs" / "compare" / "digits"
METHODS = sorted(path.stem for path in COMPARED.glob("*.yaml") if path.stem != "base")
SHORT = {
    "epochs": 3,
    "batch_size": 64,
    "data": {"limit": 640},
    "schedule": {"warmup_epochs": 1},
    "engine": {"precision": "float32"},
    "monitor": {"every_epochs": 1.5},
    "checkpoint": {"every_epochs": 0.2},
    "log": {"every_steps": 4},
}  # 10 steps an epoch, 30 in all; a checkpoint every 2


def short(method: str) -> dict[str, object]:
    queue = (
        {"method": {"queue_size": 256}}
        if "queue_size" in (COMPARED.parent / f"cifar10/{method}.yaml").read_text()
        else {}
    )
    return {"extends": str(COMPARED / f"{method}.yaml"), **SHORT, **queue}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_bit_identical(method: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump(short(method)))
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = run(recipe, calm)
    assert done.returncode == 0, done.stderr
    assert interrupt(recipe, rough, 14, signal.SIGKILL) == -signal.SIGKILL
    resumed = run(recipe, rough)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    expected, got = final_tensors(calm), final_tensors(rough)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert rows(calm) == rows(rough)
