"""Checkpoint folders: round trip, damage, half-written drafts, how many are kept."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from trainers.engine import Ranks, recut
from trainers.state import (
    CheckpointError,
    RunState,
    commit_draft,
    damage,
    draft_path,
    find_checkpoint,
    load_checkpoint,
    load_strict,
    locked,
    save_checkpoint,
    write_draft,
)

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)


def state(step: int) -> RunState:
    generator = torch.Generator().manual_seed(step)
    return RunState(
        step,
        shared={"method": {"w": torch.randn(3, 4, generator=generator).t(), "n": torch.tensor(step)}},
        sharded={"generators": {"cpu": torch.get_rng_state()}},
        values={"note": "a"},
    )


def test_round_trip(tmp_path: Path) -> None:
    written = state(7)
    path = save_checkpoint(tmp_path, written, ALONE, keep=3)
    assert path.name == "step-00000007"
    assert (tmp_path / "checkpoints/last").resolve() == path.resolve()
    read = load_checkpoint(path, ALONE)
    assert read.step == 7
    assert read.values["note"] == "a"
    for name, value in written.shared["method"].items():
        assert torch.equal(read.shared["method"][name], value)
    assert torch.equal(read.sharded["generators"]["cpu"], written.sharded["generators"]["cpu"])


def test_only_the_newest_are_kept_and_last_follows(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, state(step), ALONE, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["last", "step-00000003", "step-00000004"]
    assert (tmp_path / "checkpoints/last").resolve().name == "step-00000004"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda p: (p / "method.safetensors").write_bytes(b"x"), "checksum of method.safetensors"),
        (lambda p: (p / "method.safetensors").unlink(), "method.safetensors"),
        (lambda p: (p / "state.json").write_text("{}"), "checksum of state.json"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest"),
        (lambda p: (p / "extra").write_text("?"), "extra"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm, reason: str) -> None:
    save_checkpoint(tmp_path, state(1), ALONE, keep=3)
    newest = save_checkpoint(tmp_path, state(2), ALONE, keep=3)
    harm(newest)
    assert reason in (damage(newest) or "")
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), ALONE, keep=3)
    data = bytearray((path / "method.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "method.safetensors").write_bytes(data)
    assert damage(path) is not None


def test_a_half_written_draft_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), ALONE, keep=3)
    draft = tmp_path / "checkpoints/.step-00000002.tmp"
    draft.mkdir()
    (draft / "method.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    save_checkpoint(tmp_path, state(2), ALONE, keep=3)
    assert damage(tmp_path / "checkpoints/step-00000002") is None


def test_saving_over_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(5), ALONE, keep=3)
    (path / "state.json").write_text("")
    save_checkpoint(tmp_path, state(5), ALONE, keep=3)
    assert damage(path) is None
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["last", "step-00000005"]


@pytest.mark.parametrize(
    ("existing", "step", "keep", "left"),
    [
        ((10, 15, 20), 2, 3, (2,)),
        ((10, 15, 20), 17, 1, (17,)),
        ((10, 15, 20), 17, 2, (15, 17)),
        ((10, 15), 15, 3, (10, 15)),
    ],
)
def test_checkpoints_of_an_abandoned_future_go(tmp_path: Path, existing, step: int, keep: int, left) -> None:
    """After a resume from before damaged checkpoints, they must not push out the one just written."""
    for number in existing:
        save_checkpoint(tmp_path, state(number), ALONE, keep=9)
    save_checkpoint(tmp_path, state(step), ALONE, keep=keep)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [f"step-{number:08d}" for number in left]
    assert find_checkpoint(tmp_path) == tmp_path / f"checkpoints/step-{step:08d}"
    assert (tmp_path / "checkpoints/last").resolve().exists()


def test_a_run_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CheckpointError, match="in use by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_nothing_found_in_an_empty_folder(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), ALONE, keep=3)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path, ALONE)


def test_another_number_of_ranks_gets_the_shards_of_all(tmp_path: Path) -> None:
    written = state(1)
    written.sharded["optimizer"] = {"group0::momentum_buffer": torch.ones(3)}
    path = save_checkpoint(tmp_path, written, ALONE, keep=3)
    read = load_checkpoint(path, Ranks(1, 2, torch.device("cpu"), None, None))
    assert read.sharded == {}
    assert [list(shard) for shard in read.all_shards["optimizer"]] == [["group0::momentum_buffer"]]
    written.sharded["loader"] = {"state": torch.ones(3)}
    path = save_checkpoint(tmp_path, written, ALONE, keep=3)
    with pytest.raises(CheckpointError, match="DALI's own readers stood on 1 ranks, this run has 2"):
        load_checkpoint(path, Ranks(0, 2, torch.device("cpu"), None, None))


@pytest.mark.parametrize("size", [1, 2, 11, 12, 24])
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("now", [1, 2, 3])
def test_shards_are_cut_anew(size: int, before: int, now: int) -> None:
    """Padded to a multiple of twice the ranks and cut evenly, as DeepSpeed does."""

    def cut(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
        padded = torch.cat([whole, torch.zeros(-len(whole) % (2 * ranks))])
        return list(padded.chunk(ranks))

    whole = torch.arange(1.0, size + 1)
    for rank, expected in enumerate(cut(whole, now)):
        assert torch.equal(recut(cut(whole, before), size, len(expected), rank), expected)
    with pytest.raises(ValueError, match="the parameters are"):
        recut(cut(whole, before), size + 7, size, 0)


def test_permanent_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        write_draft(draft_path(tmp_path, step), state(step), 0, 1)
        sums = write_draft(draft_path(tmp_path, step), state(step), 0, 1)
        commit_draft(tmp_path, step, [sums], keep=2, permanent=4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in (4, 8, 9)]


def test_who_holds_the_folder_is_said(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CheckpointError, match=rf"process {os.getpid()}\)"), locked(tmp_path):
        pass


def test_loading_is_strict_and_says_what_differs() -> None:
    module = torch.nn.Linear(2, 3)
    load_strict(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "x")
    assert torch.equal(module.weight.detach(), torch.ones(3, 2))
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, {"weight": torch.ones(3, 4), "bais": torch.ones(3)}, "some/file")
    for part in ("some/file", "missing bias", "unexpected bais", "weight is [3, 4], expected [3, 2]"):
        assert part in str(caught.value)
