"""What is remembered of CLIP's teacher changes nothing: not the training, not a run that goes on, not a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.views import View
from tests.distributed import run_ranks
from tests.test_train import final_tensors, interrupt, rows, run
from tests.trainers.parts.tiny_clip import PLAIN, plain_method, settings, write_teacher
from tests.trainers.small_runs import BATCH, LR, SmallRun, micro_batches, views_of_step
from trainers.encoders import EncoderConfig, build_encoder
from trainers.state import load_strict
from trainers.step import train_step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings that name a small teacher."""
    return {"teacher": write_teacher(tmp_path_factory.mktemp("teacher")), "pretrained": None}


def two_steps_of_epoch(epoch: int, dtype: torch.dtype) -> list[ViewBatch]:
    """The same 48 images in every epoch, the first view alike and in another order."""
    batches = [views_of_step(number, dtype) for number in (0, 1)]
    order = torch.randperm(2 * BATCH, generator=torch.Generator().manual_seed(epoch))
    views = torch.cat([batch.views for batch in batches], dim=1)
    labels, indices = torch.cat([b.labels for b in batches]), torch.cat([b.indices for b in batches])
    return [ViewBatch(views[:, part], labels[part], indices[part]) for part in order.split(BATCH)]


def epochs(
    group: dist.ProcessGroup | None, given: dict[str, Any], *, restart: int = -1, **engine: Any
) -> dict[str, Any]:
    """Three epochs of two steps, each in another order; at step `restart` a new method goes on with the state."""
    run = SmallRun(group, plain_method(given), **engine)
    losses, embedded = [], []
    for step in range(6):
        if step == restart:
            saved = {key: value.clone() for key, value in run.method.state_dict().items()}
            optimizer = run.engine.optimizer_state()
            run = SmallRun(group, plain_method(given), **engine)
            load_strict(run.method, saved, "the state")
            run.engine.load_optimizer_state({key: value.clone() for key, value in optimizer.items()})
        counted = Counted(run.method)
        batch = two_steps_of_epoch(step // 2, run.dtype)[step % 2]
        parts = micro_batches(batch, run.ranks, run.accumulation)
        losses.append(train_step(run.engine, run.method, parts, LR).scalars["loss"].item())
        embedded.append(counted.images)
        counted.restore()
    state = {key: value.double() for key, value in run.method.state_dict().items()}
    return {"losses": losses, "embedded": embedded, "state": state, "complete": run.method.remembered.complete}


class Counted:
    """Counts the images that the teacher of a method embeds."""

    def __init__(self, method: Any) -> None:
        self.images, self._method, self._embed = 0, method, method.teacher.embed
        method.teacher.embed = self

    def __call__(self, views: Tensor) -> Tensor:
        self.images += len(views)
        return self._embed(views)

    def restore(self) -> None:
        self._method.teacher.embed = self._embed


def several(group: dist.ProcessGroup | None, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: epochs(group, **case) for name, case in cases.items()}


def test_a_remembered_teacher_teaches_the_same(teacher: dict[str, Any]) -> None:
    """With the table or without, resumed or not: to the bit. Over ranks and micro-batches: as everything else."""
    kept, never = ({"given": settings(teacher, cache_gb=gigabytes)} for gigabytes in (1.0, 0.0))
    frozen = {"batchnorm": "frozen"}
    micro = frozen | {"accumulation": 2}
    [one] = run_ranks(
        1,
        several,
        {
            "kept": kept,
            "never": never,
            "resumed": kept | {"restart": 3},
            "frozen": kept | frozen,
            "micro": kept | micro,
        },
    )
    two = run_ranks(2, several, {"kept": kept, "micro": kept | micro})
    for name in ("never", "resumed"):
        assert one[name]["losses"] == one["kept"]["losses"], name
        assert all(torch.equal(one[name]["state"][key], value) for key, value in one["kept"]["state"].items())
    for found, expected in (
        (one["micro"], one["frozen"]),
        (two[0]["kept"], one["kept"]),
        (two[0]["micro"], one["frozen"]),
    ):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    assert one["never"]["embedded"] == [BATCH] * 6
    for result in (one["kept"], one["micro"]):
        assert result["embedded"] == [BATCH, BATCH, 0, 0, 0, 0]
    for rank in two:
        assert rank["kept"]["embedded"] == rank["micro"]["embedded"] == [BATCH // 2, BATCH // 2, 0, 0, 0, 0]
    seen = two_steps_of_epoch(1, torch.float64)[1].indices.tolist()  # in step 3, the first after the restart
    new = len(set(two_steps_of_epoch(2, torch.float64)[0].indices.tolist()) - set(seen))
    assert one["resumed"]["embedded"] == [BATCH, BATCH, 0, BATCH, new, BATCH - new], "filled anew"
    assert one["kept"]["complete"]
    assert not one["never"]["complete"]


def test_what_changes_from_epoch_to_epoch_is_not_remembered(teacher: dict[str, Any]) -> None:
    moved = (View(crop="random_resized"), View(crop="random_resized"))
    for plan, given, expected in (
        (PLAIN, {}, True),
        (moved, {}, False),
        (PLAIN, {"cache_gb": 0}, False),
        (PLAIN, {"cache_gb": 2 * BATCH * 24 * 2 / 1e9}, True),
        (PLAIN, {"cache_gb": (2 * BATCH * 24 * 2 - 1) / 1e9}, False),
    ):
        assert plain_method(settings(teacher, **given), plan).remembered.enabled == expected
    one_view = plain_method(settings(teacher, mode="supervised"), (View(crop="random_resized", flip=0.5),))
    assert not one_view.remembered.enabled


RECIPE = """
epochs: 3
batch_size: 64
data: {source: digits, limit: 640}
views: {custom: [{crop: center}, {crop: random_resized, crop_scale: [0.4, 1.0]}]}
encoder: {arch: resnet8x4}
optim: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 1}
monitor: {every_epochs: 1.5}
checkpoint: {every_epochs: 0.2}
log: {every_steps: 4}
"""  # 10 steps an epoch, 30 in all; a checkpoint every 2


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_and_nothing_holds_the_teacher(teacher: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "distill.yaml"
    method = {"name": "clipdistill", "mode": "supervised", **teacher}
    path.write_text(RECIPE + yaml.safe_dump({"method": method}))
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = run(path, calm)
    assert done.returncode == 0, done.stderr
    assert interrupt(path, rough, 14, signal.SIGKILL) == -signal.SIGKILL  # the table was filled, and is lost
    resumed = run(path, rough)
    assert "resuming from" in resumed.stdout, resumed.stderr
    expected, got = final_tensors(calm), final_tensors(rough)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert rows(calm) == rows(rough)
    last = calm / "checkpoints" / "last"
    kept = {key.partition(".")[0] for key in load_file(last / "method.safetensors")}
    assert kept == {"encoder", "classifier", "head"}
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 8)
    encoder.load_state_dict(load_file(calm / "encoder.safetensors"), strict=True)

    missing = run(path, tmp_path / "missing", "method.teacher=local-dir:nowhere")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: method.teacher=local-dir:nowhere cannot be loaded")
    assert missing.stderr.count("\n") == 1, "a line, no traceback"
