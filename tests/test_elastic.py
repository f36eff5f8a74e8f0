"""A run goes on with another number of ranks, and nobody can tell from its losses and weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tests.forked  # noqa: F401  (what the forked ranks begin with)
from tests.distributed import run_ranks
from tests.trainers.small_runs import STEPS, SmallRun, difference, make_method, parameters
from trainers.elastic import elastic_remarks
from trainers.engine import EngineConfig
from trainers.state import RunState, load_checkpoint, load_strict, save_checkpoint

ROOT = Path(__file__).parents[1]
SETTINGS = {"temperature": 0.5, "projector": {"hidden": 32, "output": 16}}
PARTS = {1: 6, 2: 3, 3: 2}  # micro-batches of the same images on any number of ranks
CASES: dict[str, dict[str, Any]] = {
    "lars": {"optimizer": "lars", "dtype": torch.float64, "batchnorm": "sync"},
    "adamw": {"optimizer": "adamw", "dtype": torch.float64, "batchnorm": "sync"},
    "micro-batches": {"optimizer": "sgd", "dtype": torch.float64, "batchnorm": "frozen", "parts": True},
    "zero 1": {"optimizer": "adam", "dtype": torch.float32, "batchnorm": "frozen", "zero_stage": 1},
    "zero 2": {"optimizer": "sgd", "dtype": torch.float32, "batchnorm": "frozen", "zero_stage": 2},
    "zero 2, micro-batches": {"optimizer": "adamw", "dtype": torch.float32, "batchnorm": "frozen", "zero_stage": 2}
    | {"parts": True},
}
# Number of ranks -> (the checkpoint to begin with, the step at which to write one); each is named by its writers.
CHAIN: list[tuple[int, list[tuple[int | None, int | None]]]] = [
    (1, [(None, 2)]),
    (2, [(1, 3)]),
    (3, [(1, None), (2, 4)]),
    (1, [(2, None), (3, None)]),
    (2, [(3, None)]),
]


def go_on(group: dist.ProcessGroup, folder: Path, jobs: list[tuple[int | None, int | None]]) -> dict[Any, Any]:
    """Every case from each of the checkpoints on: the losses of its steps, and the weights at the end."""
    return {
        (name, begin): _train(group, folder / name, begin, save_at, **case)
        for name, case in CASES.items()
        for begin, save_at in jobs
    }


def _train(
    group: dist.ProcessGroup,
    folder: Path,
    begin: int | None,
    save_at: int | None,
    *,
    dtype: torch.dtype,
    parts: bool = False,
    **engine: Any,
) -> dict[str, torch.Tensor]:
    accumulation = PARTS[dist.get_world_size()] if parts else 1
    run = SmallRun(group, make_method("simclr", SETTINGS, dtype=dtype), accumulation=accumulation, **engine)
    step = 0 if begin is None else _load(run, folder / str(begin))
    losses = []
    while step < STEPS:
        if step == save_at:
            _save(run, folder / str(run.ranks.world_size), step)
        losses.append(run.step(step).scalars["loss"])
        step += 1
    return {"loss": torch.stack(losses).double(), "weights": parameters(run.method)}


def _save(run: SmallRun, folder: Path, step: int) -> None:
    optimizer = {"optimizer": run.engine.optimizer_state()}
    shared: dict[str, Any] = {"method": dict(run.method.state_dict())}
    sharded = optimizer if run.engine.config.zero_stage else {}
    save_checkpoint(folder, RunState(step, shared if sharded else shared | optimizer, sharded), run.ranks, keep=1)


def _load(run: SmallRun, folder: Path) -> int:
    state = load_checkpoint(folder / "checkpoints/last", run.ranks)
    load_strict(run.method, state.shared["method"], "method")
    if run.engine.config.zero_stage:
        assert state.sharded == {}
        run.engine.load_optimizer_shards(state.all_shards["optimizer"])
        _check_own_shards(run, folder)
    else:
        run.engine.load_optimizer_state(state.shared["optimizer"])
    return state.step


def _check_own_shards(run: SmallRun, folder: Path) -> None:
    """What is written again is what was read, to the bit, but for the padding."""
    own = run.engine.optimizer_state()
    every: list[Any] = [None] * run.ranks.world_size
    dist.all_gather_object(every, own)
    files = sorted((folder / "checkpoints/last").glob("optimizer-rank-*.safetensors"))
    from safetensors.torch import load_file

    read = [load_file(file) for file in files]
    for name, value in own.items():
        if value.dim():
            ours, theirs = torch.cat([of[name] for of in every]), torch.cat([of[name] for of in read])
            shorter = min(len(ours), len(theirs))
            assert torch.equal(ours[:shorter], theirs[:shorter])
            assert not ours[shorter:].any()
            assert not theirs[shorter:].any()
            assert theirs.any()


def test_any_number_of_ranks_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1, 1 -> 3, 3 -> 2 and 2 -> 1, in float64 to 1e-9; under ZeRO, which is float32, to 1e-5."""
    undisturbed: dict[str, Any] = {}
    worst: dict[str, float] = {}
    for world_size, jobs in CHAIN:
        results = run_ranks(world_size, go_on, tmp_path, jobs, timeout=280)
        for (name, begin), found in results[0].items():
            for other in results[1:]:
                assert torch.equal(other[name, begin]["weights"], found["weights"]), "the ranks differ"
            if begin is None:
                undisturbed[name] = found
                continue
            tolerance = 1e-9 if CASES[name]["dtype"] == torch.float64 else 1e-5
            expected = undisturbed[name]["loss"][STEPS - len(found["loss"]) :]
            apart = max(difference(found["loss"], expected), difference(found["weights"], undisturbed[name]["weights"]))
            assert apart < tolerance, f"{name}: {begin} -> {world_size} ranks"
            worst[name] = max(worst.get(name, 0), apart)
    print(worst)
    assert worst.keys() == CASES.keys()


@pytest.mark.parametrize(
    ("written", "now", "world_size", "expected"),
    [
        ({"world_size": 2, "accumulation": 1}, {}, 2, []),
        ({"world_size": 2, "accumulation": 1}, {}, 1, ["written by 2 ranks, going on with 1 rank: the same batches"]),
        (
            {"world_size": 4, "accumulation": 1, "encoder": {"dropout": 0.1}},
            {"accumulation": 2},
            2,
            ["2 ranks × 2 micro-batches", "other masks", "BatchNorm sees 16 images at once, 32 before"],
        ),
        (
            {"world_size": 2, "accumulation": 1},
            {"batchnorm": "local"},
            1,
            ["", "BatchNorm sees 32 images at once, 16 before"],
        ),
        ({"world_size": 2, "accumulation": 1}, {"batchnorm": "local", "accumulation": 2}, 1, ["1 rank × 2 micro"]),
        ({"world_size": 2, "accumulation": 2}, {"accumulation": 2}, 1, ["", "as before, but others together"]),
        ({"world_size": 2}, {"accumulation": 2}, 2, []),  # written before accumulation was
    ],
)
def test_what_changes_is_said(written: Any, now: Any, world_size: int, expected: list[str]) -> None:
    remarks = elastic_remarks(written, world_size, EngineConfig(**now), 32)
    assert len(remarks) == len(expected)
    assert all(part in remark for part, remark in zip(expected, remarks, strict=True)), remarks


RECIPE = """
epochs: 4
batch_size: 36
data: {source: digits, limit: 160, last: pad, order: quasi_random}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, temperature: 0.5, projector: {hidden: 32, output: 16}}
optim: {name: adam, lr: 0.00001}
schedule: {warmup_epochs: 0}
monitor: {every_epochs: 4}
checkpoint: {every_epochs: null, every_steps: 5, keep: 9}
log: {every_steps: 1}
"""  # 5 steps an epoch


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("engine.zero_stage=1",), ("engine.zero_stage=2",)])
def test_train_py_under_torchrun(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """A run of 1, then 2, then 3, then 2 processes by epochs, in float32: the curve of one process to 1e-5.

    The learning rate is small, so that the curve shows whether the state is the same: see test_engine.py for what
    float32 and synchronised BatchNorm do to a chaotic one.
    """
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    for epochs, processes in enumerate((1, 2, 3, 2), start=1):
        printed = _launch(
            recipe, tmp_path / "elastic", processes, f"epochs={epochs}", "schedule.name=constant", *overrides
        )
        if epochs > 1:
            assert re.search(rf"written by \d ranks?, going on with {processes} rank", printed), printed[-3000:]
    _launch(recipe, tmp_path / "one", 1, "schedule.name=constant", *overrides)
    elastic, one = (_losses(tmp_path / name) for name in ("elastic", "one"))
    assert len(elastic) == len(one) == 20
    assert elastic == pytest.approx(one, rel=1e-5)
    assert len({round(loss, 3) for loss in one}) > 10, "the losses differ from step to step"


def _launch(recipe: Path, run_dir: Path, processes: int, *overrides: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), str(recipe), f"run.dir={run_dir}", *overrides],
        cwd=recipe.parent, capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]
