"""What a run keeps beside the method, MINE and the state of dropout's generator, is in its checkpoints."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.test_train import RECIPE, final_tensors, interrupt, rows, run


@pytest.mark.slow
def test_a_killed_run_with_dropout_and_mine_ends_bit_identical(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        RECIPE.replace("{name: simclr,", "{name: probsimclr, dropout: 0.2,").replace(
            "{every_epochs: 1}", "{every_epochs: 1, mine: true}"
        )
    )
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = run(recipe, calm)
    assert done.returncode == 0, done.stderr
    assert interrupt(recipe, rough, 6, signal.SIGKILL) == -signal.SIGKILL  # in mid-epoch: an epoch is 5 steps
    resumed = run(recipe, rough)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout

    expected, got = final_tensors(calm), final_tensors(rough)
    assert "mine.safetensors/log_average" in got
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert rows(calm) == rows(rough)
    assert all("train/mine/mutual_information" in row for row in rows(calm) if "train/loss" in row)
    with safe_open(rough / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["twinstream"])["dropout"] == 0.2
