"""How a run ends, or goes on, when two things go wrong at once: each is a whole run of ``train.py``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forked import finished, start_training
from tests.tiny_runs import written_recipe


def run(folder: Path, before: Any, *overrides: str) -> tuple[int | None, str]:
    """(exit code, what was printed) of a run in ``folder/run`` in which ``before(folder/run)`` was called at first."""
    output = folder / "output.log"
    arguments = [
        written_recipe(folder),
        f"run.dir={folder / 'run'}",
        "epochs=3",
        "schedule.warmup_epochs=0",
        *overrides,
    ]
    process = start_training(arguments, output, None, before, folder / "run")
    try:
        return finished(process), output.read_text()
    finally:
        process.kill()


def a_bad_image_while_a_checkpoint_is_written(run_dir: Path) -> None:
    from pipelines.sources import DataError
    from trainers import checkpoint_writer, pretrain

    write, timed = checkpoint_writer.write_draft, pretrain._timed

    def slow(*about: Any) -> Any:
        time.sleep(3)
        return write(*about)

    def failing(batches: Any) -> Any:
        for number, batch in enumerate(timed(batches)):
            if number == 2 and (run_dir / "metrics.jsonl").exists():
                raise DataError("cannot decode y.jpg")
            yield batch

    checkpoint_writer.write_draft, pretrain._timed = slow, failing


def test_a_failure_waits_for_the_checkpoint_under_way(tmp_path: Path) -> None:
    code, printed = run(tmp_path, a_bad_image_while_a_checkpoint_is_written)
    assert code == 1, printed
    assert "error: cannot decode y.jpg" in printed
    assert (tmp_path / "run/checkpoints/last/manifest.json").exists()
    assert json.loads((tmp_path / "run/status.json").read_text())["cause"] == "cannot decode y.jpg"


def no_recipe_file(run_dir: Path) -> None:
    from trainers import pretrain

    state_of = pretrain.run_state

    def without(*about: Any) -> Any:
        (run_dir / "recipe.yaml").unlink(missing_ok=True)
        return state_of(*about)

    pretrain.run_state = without


def test_a_checkpoint_needs_no_file_of_the_run_folder(tmp_path: Path) -> None:
    code, printed = run(tmp_path, no_recipe_file)
    assert code == 0, printed
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())
    assert "resnet8x4" in state["recipe"]


def a_bad_step_and_no_place_to_list_it(run_dir: Path) -> None:
    from trainers.methods import simclr

    loss, calls = simclr.Method.loss, []

    def bad(*about: Any) -> Any:
        calls.append(1)
        found = loss(*about)
        return found | {"loss": found["loss"] * float("nan")} if len(calls) == 3 else found

    simclr.Method.loss = bad  # type: ignore[method-assign]
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("")
    (run_dir / "nonfinite").write_text("a file where the folder should be")


@pytest.mark.parametrize(("policy", "expected"), [("skip", 0), ("stop", 1)])
def test_a_bad_step_that_cannot_be_listed(policy: str, expected: int, tmp_path: Path) -> None:
    code, printed = run(tmp_path, a_bad_step_and_no_place_to_list_it, f"engine.nonfinite={policy}")
    assert code == expected, printed
    assert "its images could not be listed" in printed
    assert "Traceback" not in printed


def interrupt_twice(run_dir: Path) -> None:
    import os
    import signal

    from trainers import pretrain

    step = pretrain.NonfiniteGuard.step

    def interrupted(*about: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(*about)

    pretrain.NonfiniteGuard.step = interrupted  # type: ignore[method-assign]


def test_ctrl_c_twice(tmp_path: Path) -> None:
    code, _ = run(tmp_path, interrupt_twice)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (code, status["exit_code"]) == (130, 130)
