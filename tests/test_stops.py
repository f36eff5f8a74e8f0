"""``train.py`` stopped at awkward moments, on full and read-only disks, and started twice at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, finished, start_training, wait_until
from tests.tiny_runs import check_same, rows, train, written_recipe
from trainers.state import damage, find_checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written_recipe(tmp_path)


def wait_for_the_signal() -> None:
    """In a run: until it was told to stop."""
    from trainers.stopping import StopSignal

    deadline = time.monotonic() + 100
    while not StopSignal.installed().requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_in_a_write(marker: Path) -> None:
    """In a run: the first write takes until the signal has come, and longer."""
    from trainers import checkpoint_writer

    real = checkpoint_writer.write_draft

    def slow(*args: Any) -> dict[str, str]:
        checkpoint_writer.write_draft = real
        marker.touch()
        wait_for_the_signal()
        time.sleep(0.3)
        return real(*args)

    checkpoint_writer.write_draft = slow


def stop_in_an_evaluation(marker: Path, number: int) -> None:
    """In a run: its `number`-th pass over images without training stands still after a batch until the signal."""
    from trainers import monitors

    real, passes = monitors.plain_batches, []

    def slow(*args: Any) -> Iterator[Any]:
        passes.append(None)
        for batch in real(*args):
            yield batch
            if len(passes) == number:
                marker.touch()
                wait_for_the_signal()

    monitors.plain_batches = slow


def stop(recipe: Path, run_dir: Path, before: Callable[..., None], *about: Any, signals: int = 1) -> str:
    """A run that is stopped where `before` lets it stand; returns what it printed."""
    marker = run_dir.with_suffix(".marker")
    marker.unlink(missing_ok=True)
    output = run_dir.with_suffix(".log")
    begin = output.stat().st_size if output.exists() else 0
    process = start_training([recipe, f"run.dir={run_dir}", "epochs=4"], output, None, before, marker, *about)
    try:
        wait_until(marker.exists, process)
        for _ in range(signals):
            os.kill(process.pid or 0, signal.SIGTERM)
        code = finished(process)
    finally:
        process.kill()
    printed = output.read_bytes()[begin:].decode()
    assert code == 75, printed[-3000:]
    assert re.search(r"stopped by SIGTERM at step \d+, its checkpoint in place \d+\.\d s after the signal", printed)
    return printed


def test_stopped_in_writes_and_evaluations(recipe: Path, tmp_path: Path) -> None:
    """The stop does not wait for the evaluation, which comes first after it; the end is the undisturbed run's."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    train(recipe, calm, "epochs=4")
    stop(recipe, rough, stop_in_a_write, signals=3)
    last = rough / "checkpoints/last"
    assert damage(last) is None
    assert not list((rough / "checkpoints").glob(".*"))
    stop(recipe, rough, stop_in_an_evaluation, 1)
    assert last.resolve().name == "step-00000008"
    assert json.loads((last / "state.json").read_text())["evaluation_left"]
    assert not any("holdout/probe" in row for row in rows(rough))
    stop(recipe, rough, stop_in_an_evaluation, 2)  # the same evaluation, further on
    assert last.resolve().name == "step-00000008"
    stop(recipe, rough, stop_in_an_evaluation, 4)  # the evaluation after the last step
    assert last.resolve().name == "step-00000016"
    assert not (rough / "encoder.safetensors").exists()
    train(recipe, rough, "epochs=4")
    check_same(rough, calm)
    train(recipe, rough, "epochs=4")  # a finished run is left as it is
    check_same(rough, calm)


def test_a_signal_at_one_rank_stops_all_in_an_evaluation_and_one_process_goes_on(recipe: Path, tmp_path: Path) -> None:
    arguments = [recipe, f"run.dir={tmp_path / 'run'}", "epochs=4", "optim.lr=0.00001", "method.temperature=0.5"]
    marker = tmp_path / "marker"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        start_training(
            arguments, tmp_path / f"{rank}.log", common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, *extra
        )
        for rank, extra in enumerate([(), (stop_in_an_evaluation, marker, 1)])
    ]
    try:
        wait_until(marker.exists, ranks[1])
        os.kill(ranks[1].pid or 0, signal.SIGTERM)
        codes = [finished(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    printed = (tmp_path / "0.log").read_text()
    assert codes == [75, 75], printed[-3000:]
    assert "stopped by a signal on another rank at step 8" in printed
    resumed = train(recipe, tmp_path / "run", *map(str, arguments[2:]))
    assert "written by 2 ranks, going on with 1 rank: the same batches in the same order" in resumed
    train(recipe, tmp_path / "one", *map(str, arguments[2:]))
    ours, theirs = rows(tmp_path / "run"), rows(tmp_path / "one")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    losses = [[row["train/loss"] for row in of if "train/loss" in row] for of in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # so small a learning rate, since float32 is chaotic


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_a_signal_at_the_moment_its_handler_is_in_place() -> None:
    """Ends the process as any other before the first step does, and is not only noted."""
    code = """
import os, signal, time
from trainers.stopping import StopSignal
install = signal.signal
def install_and_send(number, handler):
    install(number, handler)
    os.kill(os.getpid(), number)
signal.signal = install_and_send
StopSignal.installed()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.split(":")[0]) == (75, "stopped by SIGTERM before the first step")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_stopped_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    """While it imports, and while it waits for another rank inside a library: at once, with nothing to save."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(recipe), f"run.dir={tmp_path / 'run'}"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        wait_until(lambda: catches_sigterm(process.pid))
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75
    assert printed == "stopped by SIGTERM before the first step: nothing to save, the same command starts again\n"
    assert not (tmp_path / "run").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    alone = start_training([recipe, f"run.dir={tmp_path / 'run'}"], tmp_path / "run.log", environment)
    try:
        wait_until(lambda: _listens(port), alone)
        os.kill(alone.pid or 0, signal.SIGUSR1)
        assert finished(alone, 60) == 75
    finally:
        alone.kill()
    assert "stopped by SIGUSR1" in (tmp_path / "run.log").read_text()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# ---- storage --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing fits any more."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return ballast


def test_a_full_disk(recipe: Path, tmp_path: Path, small_disk: Path) -> None:
    """The run goes on without checkpoints until there is room, and nothing is missing in the end."""
    calm, run_dir = tmp_path / "calm", small_disk / "run"
    train(recipe, calm, "epochs=6")
    output = tmp_path / "full.log"
    process = start_training([recipe, f"run.dir={run_dir}", "epochs=6"], output)
    try:
        wait_until(lambda: find_checkpoint(run_dir), process)
        ballast = fill(small_disk)
        wait_until(lambda: output.read_text().count("warning: the checkpoint") >= 2, process)
        assert damage(run_dir / "checkpoints/last") is None
        ballast.unlink()
        assert finished(process) == 0, output.read_text()[-3000:]
    finally:
        process.kill()
    printed = output.read_text()
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    check_same(run_dir, calm)
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.parametrize("setting", ["checkpoint.tolerate_minutes=0", "checkpoint.every_steps=null"])
def test_a_full_disk_that_ends_the_run(recipe: Path, tmp_path: Path, small_disk: Path, setting: str) -> None:
    """No failure is tolerated; or it is the last checkpoint that cannot be written."""
    output = tmp_path / "full.log"
    process = start_training([recipe, f"run.dir={small_disk / 'run'}", "epochs=3", setting], output)
    try:
        wait_until(lambda: "step 1/12" in output.read_text() if output.exists() else False, process)
        fill(small_disk)
        assert finished(process) == 1
    finally:
        process.kill()
    printed = output.read_text()
    message = printed[printed.index("error: ") :]
    assert re.fullmatch(
        r"error: the checkpoint of step \d+ could not be written.*No space left.*; the same command.*\n", message
    )
    last = small_disk / "run/checkpoints/last"
    assert not last.is_symlink() or damage(last) is None


def test_a_read_only_run_folder(recipe: Path, tmp_path: Path, small_disk: Path) -> None:
    train(recipe, small_disk / "run", "epochs=2")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("run", "new"):
        (line,) = train(recipe, small_disk / name, "epochs=3", code=2, output=tmp_path / "log").splitlines()
        assert re.fullmatch(r"error: run.dir=.* cannot be used: .*Read-only file system.*", line)


# ---- two at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_two_runs_started_at_once(recipe: Path, tmp_path: Path, times: int) -> None:
    """One trains; the other is refused, or finds nothing left to do if it came that late."""
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = [recipe, f"run.dir={folder / 'run'}", "epochs=2"]
        both = [start_training(arguments, folder / name) for name in ("a.log", "b.log")]
        try:
            codes = [finished(process) for process in both]
        finally:
            for process in both:
                process.kill()
        printed = [(folder / name).read_text() for name in ("a.log", "b.log")]
        assert sum("step 1/8" in text for text in printed) == 1, printed
        for code, text in zip(codes, printed, strict=True):
            if code == 2:
                assert re.search(r"error: .* is in use by another process \(host .*, process \d+\)", text), text
            else:
                assert code == 0, text
        assert [row["step"] for row in rows(folder / "run") if "train/loss" in row] == list(range(1, 9))
