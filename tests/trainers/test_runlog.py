"""The log's means: over the steps in which a scalar is known, across a checkpoint too, and no NaN loss hidden."""

import json
import math
from pathlib import Path

import torch

from trainers.engine import Ranks
from trainers.runlog import LogConfig, RunLog


def opened(folder: Path) -> RunLog:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"), group=None, control=None)
    log = RunLog(LogConfig(), folder, ranks, total_steps=10, batch_size=2, recipe={})
    log.open(0)
    return log


def step(log: RunLog, **scalars: float) -> None:
    log.add({name: torch.tensor(value) for name, value in scalars.items()}, 0.0)


def logged(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for name, value in rows[-1].items() if name.startswith("train/")}


def test_a_mean_is_over_the_steps_in_which_a_scalar_is_known(tmp_path: Path) -> None:
    log = opened(tmp_path)
    step(log, loss=1.0, late=math.nan, never=math.nan)
    step(log, loss=2.0, late=5.0, never=math.nan)
    saved = {name: value.clone() for name, value in log.state().items()}
    log.close()
    again = opened(tmp_path)
    again.load(saved)
    step(again, loss=6.0, late=7.0, never=math.nan, new=4.0)
    again.write_step(3, 0.3, 0.1)
    again.close()
    assert logged(tmp_path) == {"train/loss": 3.0, "train/late": 6.0, "train/new": 4.0, "train/lr": 0.1}


def test_a_loss_that_is_not_a_number_is_seen(tmp_path: Path) -> None:
    log = opened(tmp_path)
    step(log, loss=1.0)
    step(log, loss=math.nan)
    log.write_step(2, 0.2, 0.1)
    log.close()
    assert math.isnan(logged(tmp_path)["train/loss"])
