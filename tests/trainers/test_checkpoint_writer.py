"""Checkpoints written beside the loop: a snapshot, one at a time, and what happens when the storage fails."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import tests.forked  # noqa: F401  (what the forked ranks begin with)
from tests.distributed import run_ranks
from trainers import checkpoint_writer
from trainers.checkpoint_writer import CheckpointWriter
from trainers.engine import Ranks
from trainers.failures import TrainingError
from trainers.state import CheckpointConfig, RunState, damage, find_checkpoint

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)
WEIGHTS = torch.ones(3, 4).t()


def state(step: int, weights: torch.Tensor = WEIGHTS, rank: int = 0) -> RunState:
    return RunState(step, {"method": {"w": weights}}, {"generators": {"cpu": torch.tensor([rank])}})


class Written(CheckpointWriter):
    """Remembers what it says and what became visible."""

    def __init__(self, run_dir: Path, ranks: Ranks = ALONE, permanent: int | None = None, **config: Any) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        settings = CheckpointConfig(**config)
        super().__init__(run_dir, settings, ranks, permanent=permanent, say=self.said.append, written=self.steps.append)

    def next_step(self) -> None:
        self.advance(self.ranks.any(self.pending))


class Gate:
    """Makes a write wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        real = checkpoint_writer.write_draft

        def slow(*args: Any) -> dict[str, str]:
            self.entered.set()
            assert self.open.wait(100)
            return real(*args)

        monkeypatch.setattr(checkpoint_writer, "write_draft", slow)


def test_what_changes_after_the_snapshot_does_not_reach_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    before = weights.clone()
    writer = Written(tmp_path)
    writer.write(state(1, weights))
    assert gate.entered.wait(100)
    for _ in range(3):
        weights.add_(1)  # training goes on
        writer.next_step()
        assert find_checkpoint(tmp_path) is None
        assert writer.steps == []
    gate.open.set()
    writer.finish()
    assert writer.steps == [1]
    assert torch.equal(load_file(tmp_path / "checkpoints/last/method.safetensors")["w"], before)
    assert damage(tmp_path / "checkpoints/last") is None


def test_the_next_write_waits_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = Written(tmp_path, keep=9)
    writer.write(state(1))
    threading.Timer(0.2, gate.open.set).start()
    writer.write(state(2))
    assert writer.steps == [1]
    writer.write_now(state(3))
    assert writer.steps == [1, 2, 3]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "last", "step-00000001", "step-00000002", "step-00000003",
    ]  # fmt: skip


def test_in_the_foreground_it_is_there_at_once(tmp_path: Path) -> None:
    writer = Written(tmp_path, background=False, keep=1)
    for step in (4, 5, 8, 9):
        writer.write(state(step))
        assert writer.idle
        assert writer.steps[-1] == step


class Disk:
    """Fails a write at will."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = OSError(errno.ENOSPC, "No space left on device")
        real = checkpoint_writer.write_draft

        def write(draft: Path, *args: Any) -> dict[str, str]:
            written = real(draft, *args)
            if self.error is not None:
                raise self.error
            return written

        monkeypatch.setattr(checkpoint_writer, "write_draft", write)


def test_a_failed_write_is_a_warning_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    writer = Written(tmp_path)
    for step in (1, 2, 3, 4):
        disk.error = None if step < 4 else OSError(errno.ENOSPC, "No space left on device")
        writer.write(state(step))
        writer.finish()
    assert writer.steps == [1, 2, 3]
    (warning,) = writer.said
    for part in (
        "warning: the checkpoint of step 4",
        "No space left",
        "the last whole one is step-00000003",
        "60 more",
    ):
        assert part in warning
    # what the fourth would have pushed out went, so that there is room for the next try
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last", "step-00000002", "step-00000003"]
    assert damage(tmp_path / "checkpoints/last") is None
    disk.error = None
    writer.write(state(5))
    writer.finish()
    assert writer.steps == [1, 2, 3, 5]


def test_failures_end_the_run_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: now)
    disk = Disk(monkeypatch)
    writer = Written(tmp_path, tolerate_minutes=10, every_minutes=30)
    writer.write(state(1))
    writer.finish()
    assert not writer.due()
    now += 61
    assert writer.due(), "tried again after a minute, not after thirty"
    disk.error = None
    writer.write(state(2))
    writer.finish()
    disk.error = OSError(errno.EROFS, "Read-only file system")
    now += 3600
    writer.write(state(3))
    writer.finish()  # the first of a new series
    now += 601
    writer.write(state(4))
    with pytest.raises(TrainingError, match=r"step 4 could not be written.*Read-only.*last whole one is step-00000002"):
        writer.finish()
    assert len(writer.said) == 2


def test_the_last_one_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch)
    writer = Written(tmp_path)
    with pytest.raises(TrainingError, match="there is none before it"):
        writer.write_now(state(7))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_mistake_of_ours_is_no_failure_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.error = KeyError("oops")
    writer = Written(tmp_path)
    writer.write(state(1))
    with pytest.raises(KeyError, match="oops"):
        writer.finish()


def test_minutes_are_counted_from_the_last_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: now)
    writer, never = Written(tmp_path, every_minutes=2), Written(tmp_path, every_minutes=None)
    now += 119
    assert not writer.due()
    now += 2
    assert writer.due()
    writer.write(state(1))
    writer.finish()
    now += 100
    assert not writer.due()
    now += 1e9
    assert writer.due()
    assert not never.due()


def _of_three_ranks(group: dist.ProcessGroup, folder: Path) -> list[Any]:
    rank = dist.get_rank()
    ranks = Ranks(rank, 3, torch.device("cpu"), group, group)
    writer = Written(folder, ranks, every_minutes=1e-9)
    assert writer.due() == (rank == 0), "one clock decides"
    writer.write_now(state(1, rank=rank))
    real = checkpoint_writer.write_draft

    def full(*args: Any) -> dict[str, str]:
        if rank == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    checkpoint_writer.write_draft = full
    writer.write(state(2, rank=rank))
    writer.finish()
    checkpoint_writer.write_draft = real
    writer.write(state(3, rank=rank))
    steps = 0
    while not writer.idle:
        writer.next_step()
        steps += 1
    return [writer.steps, writer.said, steps]


def test_all_ranks_finish_or_fail_together(tmp_path: Path) -> None:
    results = run_ranks(3, _of_three_ranks, tmp_path)
    assert all(result[0] == [1, 3] for result in results)
    assert all("rank 2: [Errno 28]" in result[1][0] for result in results)
    assert len({result[2] for result in results}) == 1
    last = tmp_path / "checkpoints/last"
    assert damage(last) is None
    assert [int(load_file(last / f"generators-rank-{rank:05d}.safetensors")["cpu"]) for rank in range(3)] == [0, 1, 2]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_taken_before_what_is_queued_next(tmp_path: Path) -> None:
    weights = torch.randn(64, 32, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    before = weights.clone()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy / 64
    copies, copied = checkpoint_writer.snapshot(state(1, weights))
    weights.add_(1)
    copied()
    assert copies.shared["method"]["w"].is_pinned()
    assert torch.equal(copies.shared["method"]["w"], before.cpu())
