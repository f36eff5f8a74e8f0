"""``train.py`` killed at random moments: nothing lost beyond the last interval, and the undisturbed run's bits."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.sources import DataConfig, open_source
from tests.forked import CONTEXT, start_training, wait_until
from tests.pipelines.stored_sets import noise
from tests.tiny_runs import EVERY, check_same, rows, train, written_recipe
from trainers.state import damage, find_checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written_recipe(tmp_path)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_killed_at_random_moments(recipe: Path, tmp_path: Path, kills: int) -> None:
    """One chain of runs, each resuming what the killed one left, ends with the undisturbed run's bits and rows."""
    seed = int(os.environ.get("TWINSTREAM_KILL_SEED") or random.randrange(10**6))
    print(f"TWINSTREAM_KILL_SEED={seed}")  # pytest shows it if the test fails
    chance = random.Random(seed)
    epochs = f"epochs={2 * kills}"
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    train(recipe, calm, epochs)
    moments: dict[str, int] = {}
    for number in range(kills):
        kind = (
            ["start", "write", "step"][number]
            if number < 3
            else chance.choices(["start", "write", "step"], [1, 3, 2])[0]
        )
        background = chance.random() < 0.5
        kind = _kill(recipe, rough, kind, chance, epochs, f"checkpoint.background={str(background).lower()}")
        moments[kind] = moments.get(kind, 0) + 1
        print(f"kill {number}: {kind}, background {background}")
        whole = find_checkpoint(rough)
        seen = max((row["step"] for row in rows(rough)), default=0)
        if (rough / "checkpoints/last").is_symlink():
            assert damage(rough / "checkpoints/last") is None
        # A row is written before its step's checkpoint; written beside the loop, that before it may be under way.
        least = (seen - 1) // EVERY * EVERY if not background else (seen // EVERY - 1) * EVERY
        assert (int(whole.name[5:]) if whole else 0) >= max(0, least), f"{whole} after step {seen}"
    assert sum(moments.values()) == kills
    assert moments["write"] >= 1
    train(recipe, rough, epochs)
    check_same(rough, calm)
    print(f"{kills} kills: {moments}")


def _kill(recipe: Path, run_dir: Path, kind: str, chance: random.Random, *overrides: str) -> str:
    """Start the run and kill it; returns in which moment of its life it was hit."""
    before = len(rows(run_dir))
    process = start_training([recipe, f"run.dir={run_dir}", *overrides], run_dir.with_suffix(".log"))
    checkpoints = run_dir / "checkpoints"
    try:
        if kind == "start":
            time.sleep(chance.uniform(0, 1))
        elif kind == "write":
            old = {path.name for path in checkpoints.glob(".step-*")}
            wait_until(lambda: {path.name for path in checkpoints.glob(".step-*")} - old, process)
            time.sleep(chance.uniform(0, 0.03))
        else:
            first = rows(run_dir)[-1:]
            wait_until(lambda: len(rows(run_dir)) > before or rows(run_dir)[-1:] != first, process)
            time.sleep(chance.uniform(0, 0.3))
        assert process.is_alive(), run_dir.with_suffix(".log").read_text()[-3000:]
    finally:
        process.kill()
        process.join()
    drafts = list(checkpoints.glob(".step-*"))
    return "write" if drafts else kind if kind == "start" else "step"


# ---- the conversion -------------------------------------------------------------------------------------


def pack_folder(tree: Path, packed: Path, to: str) -> None:
    """As ``python -m tools.convert tree packed --to …``, in this process and its two workers."""
    from pipelines.packed.conversion import convert
    from pipelines.packed.encode import Options
    from pipelines.packed.gathering import gather
    from pipelines.sources import DataConfig

    source, _ = gather(DataConfig(source="folder", root=tree), None)
    convert(source, packed, Options(to=to, shard_mb=1), workers=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_conversion_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Killed again and again until it is done all the same, it has the bytes of the undisturbed one; then once more."""
    seed = int(os.environ.get("TWINSTREAM_KILL_SEED") or random.randrange(10**6))
    print(f"TWINSTREAM_KILL_SEED={seed}")
    chance = random.Random(seed)
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    for place in range(300):
        Image.fromarray(noise(64, 64, 3, seed=place)).save(tree / "a" / f"{place:03d}.jpg", quality=95)
    done, chain = 0, 0
    for to in ("ffcv", "webdataset"):
        pack_folder(tree, tmp_path / to, to)
    while done < kills:
        to = chance.choice(["ffcv", "webdataset"])
        packed, chain = tmp_path / f"{chain}-{to}", chain + 1
        while done < kills and (code := _kill_packing(tree, packed, to, chance)) != 0:
            assert code == -signal.SIGKILL
            assert not (packed / "manifest.json").exists() or _same_set(packed, tmp_path / to)
            done += 1
        pack_folder(tree, packed, to)
        assert _same_set(packed, tmp_path / to)
    print(f"{done} kills of {chain} conversions")


def _kill_packing(tree: Path, packed: Path, to: str, chance: random.Random) -> int | None:
    """The exit code: that of SIGKILL, or 0 if it was done before."""
    process = CONTEXT.Process(target=pack_folder, args=(tree, packed, to))  # type: ignore[attr-defined]
    before = _activity(packed)
    process.start()
    try:
        wait_until(lambda: _activity(packed) != before or not process.is_alive())
        time.sleep(chance.uniform(0, 0.4))
    finally:
        process.kill()
        process.join()
    code: int | None = process.exitcode
    return code


def _activity(packed: Path) -> set[tuple[str, int]]:
    found = set()
    for path in packed.rglob("*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def _same_set(packed: Path, expected: Path) -> bool:
    ours, theirs = (
        open_source(DataConfig(source="folder", root=root, holdout=0.0), "train") for root in (packed, expected)
    )
    names = {path.name for path in expected.iterdir()}
    return (
        {path.name for path in packed.iterdir()} - {".conversion"} == names
        and torch.equal(ours.labels, theirs.labels)
        and all(bytes(ours.images.read(row)) == bytes(theirs.images.read(row)) for row in range(len(theirs)))
        and all(
            (packed / name).read_bytes() == (expected / name).read_bytes() for name in names if name.endswith(".tar")
        )
    )
