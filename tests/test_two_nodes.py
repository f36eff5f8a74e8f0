"""`train.py` on two machines: network namespaces on this one, each with a launcher of its own.

Where the machine allows no namespaces, both launchers share its loopback, and there is no link to cut.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.two_hosts import ADDRESSES, CABLE, Hosts, two_hosts, why_not

ROOT = Path(__file__).parents[1]
TIMEOUT = 8
TOLD = 60  # seconds on top, for a launcher on a busy machine to notice that its rank has ended
RECIPE = f"""
epochs: 6
batch_size: 32
data: {{source: digits, limit: 160}}
views: {{plan: digits, size: 8}}
encoder: {{arch: resnet8x4}}
method: {{name: simclr, projector: {{hidden: 32, output: 16}}}}
optim: {{name: sgd, lr: 0.2}}
schedule: {{warmup_epochs: 1}}
engine: {{precision: float64, timeout: {TIMEOUT}}}
monitor: {{every_epochs: 6}}
checkpoint: {{every_epochs: 0.4}}
log: {{every_steps: 1}}
"""  # 5 steps an epoch, 30 in all; a checkpoint every 2


pytestmark = pytest.mark.timeout(1500)  # several starts of several ranks, on a machine that may be busy


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def hosts() -> Iterator[Hosts | None]:
    if why_not():
        yield None
        return
    with two_hosts() as found:
        yield found


@dataclass
class Node:
    """A launcher on one host."""

    launcher: subprocess.Popen[str]
    output: Path

    def rank(self) -> psutil.Process:
        """The process that trains, not its launcher, companion or workers."""
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[1:3] == ["-u", str(ROOT / "train.py")]:
                    return process
        raise AssertionError("no rank is running")

    def said(self) -> str:
        return self.output.read_text()

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]


def launch(recipe: Path, run_dir: Path, hosts: Hosts | None, launcher: str = "torchrun") -> list[Node]:
    train = [str(ROOT / "train.py"), str(recipe), f"run.dir={run_dir}"]
    address = ADDRESSES[0] if hosts else "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": CABLE if hosts else "lo",
    }
    nodes = []
    for number in range(2):
        where = ["--node_rank", str(number), "--master_addr", address, "--master_port", port]
        if launcher == "torchrun":
            command = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *where, *train]
        else:
            names = recipe.with_name("hostfile")
            names.write_text("first slots=1\nsecond slots=1\n")
            command = ["-m", "deepspeed.launcher.runner", "--hostfile", str(names), "--no_ssh", *where, *train]
        command = [sys.executable, *command]
        output = recipe.with_name(f"{run_dir.name}-node{number}-{time.monotonic_ns()}.txt")
        with output.open("w") as file:
            process = subprocess.Popen(
                hosts.on(number, command) if hosts else command,
                cwd=recipe.parent, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment,
            )  # fmt: skip
        nodes.append(Node(process, output))
    return nodes


@contextmanager
def running(recipe: Path, run_dir: Path, hosts: Hosts | None, launcher: str = "torchrun") -> Iterator[list[Node]]:
    nodes = launch(recipe, run_dir, hosts, launcher)
    try:
        yield nodes
    finally:
        for node in nodes:
            with suppress(psutil.NoSuchProcess):
                below = psutil.Process(node.launcher.pid).children(recursive=True)
                for process in below:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            node.launcher.kill()
            node.launcher.wait()


def wait_for(path: Path, nodes: list[Node]) -> None:
    deadline = time.monotonic() + 500
    while not path.exists():
        assert all(node.launcher.poll() is None for node in nodes), [node.said()[-2000:] for node in nodes]
        assert time.monotonic() < deadline, [node.said()[-2000:] for node in nodes]
        time.sleep(0.01)


def finish(recipe: Path, run_dir: Path, hosts: Hosts | None, launcher: str = "torchrun") -> list[str]:
    """Run to the end, or resume."""
    with running(recipe, run_dir, hosts, launcher) as nodes:
        codes = [node.launcher.wait(500) for node in nodes]
        assert codes == [0, 0], [node.said()[-3000:] for node in nodes]
        return [node.said() for node in nodes]


def losses(run_dir: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def train_alone(recipe: Path, run_dir: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(recipe), f"run.dir={run_dir}"]
    done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def test_two_hosts_follow_one_process_through_a_cut_link(recipe: Path, hosts: Hosts | None, tmp_path: Path) -> None:
    """Both sides end in time and say why; resumed, the run is that of one process, to 1e-9 in float64."""
    torn = tmp_path / "torn"
    with running(recipe, torn, hosts) as nodes:
        wait_for(torn / "checkpoints/step-00000004", nodes)
        ranks = [node.rank() for node in nodes]
        begin = time.monotonic()
        if hosts is not None:
            hosts.cut()
        else:  # without a link to cut: the other machine stands still
            for process in [*ranks[1].children(), ranks[1], psutil.Process(nodes[1].launcher.pid)]:
                process.suspend()
        watched = ranks if hosts is not None else ranks[:1]
        _, alive = psutil.wait_procs(watched, timeout=TIMEOUT + TOLD)
        assert not alive, f"still there {time.monotonic() - begin:.0f} s after the link was cut"
        lines = [node.errors() for node in nodes][: len(watched)]
        for rank, line in enumerate(lines):
            other = 1 - rank
            assert len(line) == 1, line
            assert re.fullmatch(rf"error: no word from rank {other} .* for \d+ s: .*; rank {rank} ends", line[0])
    assert list((torn / "checkpoints").glob("step-*"))
    if hosts is not None:
        hosts.mend()
    said = finish(recipe, torn, hosts)
    assert "resuming from" in said[0]
    train_alone(recipe, tmp_path / "alone")
    assert len(losses(torn)) == 30
    assert losses(torn) == pytest.approx(losses(tmp_path / "alone"), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_on_one_host_ends_both(
    recipe: Path, hosts: Hosts | None, tmp_path: Path, number: signal.Signals, victim: int, launcher: str
) -> None:
    torn = tmp_path / "torn"
    with running(recipe, torn, hosts, launcher) as nodes:
        wait_for(torn / "checkpoints/step-00000004", nodes)
        ranks = [node.rank() for node in nodes]
        ranks[victim].send_signal(number)
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT + TOLD)
        assert not alive
        codes = [node.launcher.wait(TOLD) for node in nodes]
        assert all(code != 0 for code in codes)
        cause = "has been frozen for" if number == signal.SIGSTOP else "ended without a word"
        for rank, node in enumerate(nodes):
            assert len(node.errors()) == 1, node.said()
            assert re.fullmatch(rf"error: rank {victim} \(.*\) {cause}.*; rank {rank} ends", node.errors()[0])
            assert "pretrain(run)" not in node.said(), "no traceback of what is only a consequence"
        if launcher == "torchrun":
            assert re.search(r"exitcode\s*: 69", nodes[1 - victim].said()), nodes[1 - victim].said()
    said = finish(recipe, torn, hosts)
    assert "resuming from" in said[0]
    assert len(losses(torn)) == 30
