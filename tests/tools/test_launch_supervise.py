"""What watches a launcher: exit codes turned back, signals passed on, a bounded wait, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tools.launching.supervise import judge
from trainers.status import Status, begin_status, end_status, read_status

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("launcher_stand_in.py")
DRIVER = """
import sys
from pathlib import Path
from tools.launching.supervise import StopSignal, start_local, supervise

launcher, run, mode, grace = sys.argv[1:]
stop = StopSignal()
start = lambda: [start_local([sys.executable, launcher, run, mode], {}, Path(launcher))]
outcome = supervise(start, Path(run), stop, grace=float(grace), settle=5)
print(outcome.line, flush=True)
sys.exit(outcome.code)
"""


@contextmanager
def launched(run: Path, mode: str, grace: float = 60) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, str(STAND_IN), str(run), mode, str(grace)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        left = below(process.pid)
        process.kill()
        process.communicate()
        for other in left:
            with suppress(psutil.NoSuchProcess):
                other.kill()


def below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def all_gone(processes: list[psutil.Process]) -> bool:
    """Within a while; what is dead and not yet buried is gone."""
    deadline = time.monotonic() + 30
    while any(is_alive(one) for one in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: list[Path], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in condition):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ready(run: Path) -> list[Path]:
    return [run / "ready-0", run / "ready-1"]


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("done", 0, "done"),
        ("preempted", 75, "preempted by a signal to a rank"),
        ("lost", 69, "because of lost; the same command goes on"),
        ("failed", 1, "failed: because of failed"),
        ("refused", 2, "refused: because of refused"),
        ("killed", 69, "rank 0 ended without a word"),
        ("early", 1, "exit code 1; see above"),
    ],
)
def test_the_exit_code_is_the_runs_not_the_launchers(tmp_path: Path, mode: str, code: int, said: str) -> None:
    if mode == "early":  # what an earlier run left says nothing about this one
        begin_status(tmp_path)
        end_status(tmp_path, 69, "long ago")
    with launched(tmp_path, mode) as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert said in out
        assert "long ago" not in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_each_rank_once_and_none_of_its_helpers(tmp_path: Path, number: signal.Signals) -> None:
    with launched(tmp_path, "trains") as process:
        wait_for(ready(tmp_path), process)
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "checkpoint step-00000007" in out
    assert [(tmp_path / f"told-{rank}").read_text() for rank in range(2)] == ["1 None", "1 None"]


def test_ranks_that_their_launcher_abandons_finish_their_checkpoint(tmp_path: Path) -> None:
    with launched(tmp_path, "trains") as process:
        wait_for(ready(tmp_path), process)
        for one in [psutil.Process(process.pid), *below(process.pid)]:  # as SLURM does
            one.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "told-0").exists()


def test_what_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "stubborn", grace=2) as process:
        wait_for(ready(tmp_path), process)
        started = below(process.pid)
        assert len(started) == 5
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 69
        assert "no checkpoint within the 2 seconds" in out
        assert all_gone(started)


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, "stubborn", grace=1000) as process:
        wait_for(ready(tmp_path), process)
        started = below(process.pid)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)  # one signal that is pending twice is delivered once
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert all_gone(started)


def test_a_stop_before_there_are_ranks(tmp_path: Path) -> None:
    with launched(tmp_path, "no ranks") as process:
        wait_for([tmp_path / "ready-0"], process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 69
    assert "stopped by SIGTERM; the same command starts again" in out


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
def test_a_killed_launcher_takes_the_run_with_it_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    with launched(tmp_path, "trains") as process:
        wait_for(ready(tmp_path), process)
        started = below(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert all_gone(started)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.checkpoint) == ("preempted", "step-00000007")


def test_a_failure_while_being_stopped_can_go_on() -> None:
    running = Status("running", updated="1")
    failed = Status("failed", exit_code=1, cause="Connection closed by peer", updated="2")
    assert judge(1, running, failed).code == 1
    assert judge(1, running, failed, stopped="SIGTERM").code == 69
    assert judge(-9, running, running).code == 137
    assert judge(1, running, running, leads=False).code == 69  # rank 0, elsewhere, was killed
    assert judge(75, running, running).code == 75  # DeepSpeed's launcher passes it through
    assert not judge(1, running, failed).progressed
    assert judge(1, running, Status("lost", checkpoint="step-1", exit_code=69)).progressed
