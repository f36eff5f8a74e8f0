"""Real training through ``tools.launch``: stopped, requeued and killed runs end as one that nothing happened to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from typer.testing import CliRunner

from tests.test_train import RECIPE, final_tensors, rows
from tests.tools.fake_slurm import install
from tools.launch import _repeat, app
from tools.launching.supervise import Outcome
from trainers.state import locked
from trainers.status import EXIT_CODES, read_status

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
SHORT = "epochs=2"  # 10 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.launch", "tiny.yaml", SHORT, *arguments]


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


@contextmanager
def started(folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=ENVIRONMENT | variables, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        for other in below:
            if other.is_running():
                other.kill()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def calm(folder: Path) -> Path:
    done = launch(folder, "--processes", "2", "run.dir=calm")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "launch: done (checkpoint step-00000010) [exit code 0]"
    return folder / "calm"


def assert_same_end(calm: Path, rough: Path) -> None:
    expected, got = final_tensors(calm), final_tensors(rough)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert rows(calm) == rows(rough)
    status = read_status(rough)
    assert status is not None
    assert (status.state, status.step, status.checkpoint) == ("done", 10, "step-00000010")


def test_a_stop_writes_a_checkpoint_and_ends_in_75(folder: Path) -> None:
    with started(folder, "--processes", "2", "run.dir=rough") as process:
        wait_for(folder / "rough/checkpoints/step-00000002", process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert said.splitlines()[-1].startswith("launch: preempted by SIGTERM (checkpoint step-0000000")


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one(folder: Path, calm: Path) -> None:
    if not (folder / "rough").exists():
        test_a_stop_writes_a_checkpoint_and_ends_in_75(folder)
    again = launch(folder, "--processes", "2", "run.dir=rough")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert_same_end(calm, folder / "rough")


@pytest.mark.slow
def test_a_killed_rank_is_made_up_for_by_a_restart(folder: Path, calm: Path) -> None:
    with started(folder, "--processes", "2", "--restarts", "2", "run.dir=killed") as process:
        wait_for(folder / "killed/checkpoints/step-00000004", process)
        status = read_status(folder / "killed")
        assert status is not None
        os.kill(status.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "rank 0 ended without a word" in said
    assert "start 1 of 2 again" in said
    assert_same_end(calm, folder / "killed")


@pytest.mark.slow
def test_slurm_signals_the_step_and_the_job_is_requeued(folder: Path, calm: Path) -> None:
    fake = install(folder / "slurm")
    options = ["--nodes", "2", "--processes", "1", "--slurm", "--partition", "cpu", "run.dir=slurm run"]
    refused = launch(folder, *options)  # there is no sbatch
    assert refused.returncode == 2
    options += ["--sbatch=--output=slurm-%j.out"]
    with started(folder, *options, **fake) as process:
        wait_for(folder / "slurm run/checkpoints/step-00000002", process)
        agents = [psutil.Process(int(pid)) for pid in (folder / "slurm/step").read_text().split()]
        for one in [other for agent in agents for other in [agent, *agent.children(recursive=True)]]:
            one.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert (folder / "slurm/starts").read_text().split() == ["0", "1"]
    assert said.count("launch: preempted by SIGTERM (checkpoint") == 2  # both nodes' agents
    assert_same_end(calm, folder / "slurm run")


@pytest.mark.slow
def test_two_hosts_by_ssh_stop_with_a_checkpoint(folder: Path, calm: Path) -> None:
    (folder / "bin").mkdir()
    ssh = folder / "bin/ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nexec sh -c "$2"\n')
    ssh.chmod(0o755)
    (folder / "hosts").write_text("first slots=1\nme@second slots=1\n")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    options = ["--hostfile", "hosts", "--processes", "1", "--master-addr", "127.0.0.1", "run.dir=ssh; run"]
    with started(folder, *options, PATH=path) as process:
        wait_for(folder / "ssh; run/checkpoints/step-00000002", process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    with started(folder, *options, PATH=path) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same_end(calm, folder / "ssh; run")


@pytest.mark.slow
def test_deepspeeds_launcher(folder: Path, calm: Path) -> None:
    with started(folder, "--engine", "deepspeed", "--processes", "2", "run.dir=deep") as process:
        wait_for(folder / "deep/checkpoints/step-00000002", process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert launch(folder, "--engine", "deepspeed", "--processes", "2", "run.dir=deep").returncode == 0
    assert_same_end(calm, folder / "deep")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.yaml"], "does not exist"),
        (["tiny.yaml", "optim.rl=1"], "did you mean"),
        (["tiny.yaml", "--processes", "3"], "cannot be divided over 3 ranks"),
        (["tiny.yaml", "--nodes", "3", "--processes", "1", "--slurm"], "cannot be divided over 3 ranks"),
        (["tiny.yaml", "--gpus", "4096"], "PyTorch sees"),
        (["tiny.yaml", "--gpus", "2", "--processes", "2"], "leave --processes out"),
        (["tiny.yaml", "--nodes", "2"], "say what a node has"),
        (["tiny.yaml", "--nodes", "2", "--processes", "1"], "--node-rank"),
        (["tiny.yaml", "--nodes", "2", "--processes", "1", "--node-rank", "2", "--master-addr", "a"], "from 0"),
        (["tiny.yaml", "--nodes", "2", "--processes", "1", "--node-rank", "NO_SUCH", "--master-addr", "a"], "from 0"),
        (["tiny.yaml", "--nodes", "2", "--processes", "1", "--node-rank", "0"], "--master-addr"),
        (
            ["tiny.yaml", "--nodes", "2", "--processes", "1", "--node-rank", "0", "--master-addr", "a", "--restarts=1"],
            "--restarts",
        ),
        (["tiny.yaml", "--slurm", "--hostfile", "hosts"], "choose one"),
        (["tiny.yaml", "--slurm", "--processes", "1", "--engine", "deepspeed"], "uses torchrun"),
        (["tiny.yaml", "--slurm", "--processes", "1", "--print", "--time", "1\n#SBATCH --x"], "#SBATCH line"),
        (["tiny.yaml", "--slurm", "--processes", "1", "--print", "run.dir=a; touch b"], "#SBATCH line"),
        (["tiny.yaml", "--kubernetes", "--processes", "1"], "--image and --print"),
        (["tiny.yaml", "--hostfile", "no-such-file", "--processes", "1"], "cannot be read"),
        (["tiny.yaml", "--processes", "1", "run.dir=photos"], "is not empty"),
        (["tiny.yaml", "--processes", "1", "run.dir=busy"], "in use by another process"),
        (["tiny.yaml", "--processes", "1", "--", "--evil"], "not an override"),
    ],
)
def test_mistakes_end_in_one_readable_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "busy"):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("outcomes", "restarts", "preempted", "code", "starts"),
    [
        ("lost+ lost+ done", 5, False, 0, 3),
        ("lost+ lost+ lost+", 2, False, 69, 3),
        ("lost+ lost done", 5, False, 69, 2),  # nothing was gained since the last start
        ("failed+ done", 5, False, 1, 1),
        ("preempted+ done", 5, False, 75, 1),
        ("preempted+ done", 5, True, 0, 2),
        ("lost+ done", 0, False, 69, 1),
    ],
)
def test_restarts_are_bounded_and_need_progress(
    capsys: pytest.CaptureFixture[str], outcomes: str, restarts: int, preempted: bool, code: int, starts: int
) -> None:
    coming = iter(outcomes.split())
    count = 0

    def once() -> Outcome:
        nonlocal count
        count += 1
        word = next(coming)
        return Outcome(EXIT_CODES[word.rstrip("+")], f"{word} for a reason", word.endswith("+"))

    stop = SimpleNamespace(reason=None)
    assert _repeat(partial(once), stop, restarts, preempted) == code  # type: ignore[arg-type]
    assert count == starts
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"for a reason [exit code {code}]")


def test_print_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    monkeypatch.chdir(tmp_path)
    for options in (
        ["--processes", "2"],
        ["--gpus", "2"],
        ["--engine", "deepspeed", "--processes", "2"],
        ["--nodes", "2", "--processes", "1", "--slurm"],
        ["--nodes", "2", "--gpus", "1", "--kubernetes", "--image", "x"],
        ["--nodes", "2", "--gpus", "1", "--master-addr", "first"],
        ["--nodes", "2", "--gpus", "1", "--master-addr", "first", "--node-rank", "1"],
        ["--hostfile", "hosts"],
        ["--hostfile", "hosts", "--engine", "deepspeed"],
    ):
        result = CliRunner().invoke(app, ["tiny.yaml", *options, "--print"])
        assert result.exit_code == 0, (options, result.output)
        words = result.output.split()
        assert "tiny.yaml" in words or "- tiny.yaml" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "tiny.yaml"]
