"""The watch over the ranks of a run, with ranks that are plain processes: whatever happens to one, all others end."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.two_hosts import ADDRESSES, two_hosts, why_not

FAKE = Path(__file__).with_name("fake_rank.py")
TIMEOUT = 2.5  # of the watch; far above what a busy machine keeps a process waiting
LOST = 69


class Ranks:
    """Fake ranks and their companions."""

    def __init__(self, count: int, folder: Path, address: str, on: Callable[[int, list[str]], list[str]]) -> None:
        folder.mkdir()
        self.errors = [folder / f"stderr-{rank}" for rank in range(count)]
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(count):
            arguments = [str(rank), str(count), str(folder), address, str(TIMEOUT)]
            with self.errors[rank].open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        on(rank, [sys.executable, "-S", str(FAKE), *arguments]),
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    )
                )  # fmt: skip
        self.companions = [psutil.Process(int(self.heard(rank).split()[1])) for rank in range(count)]

    def heard(self, rank: int) -> str:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        return stdout.readline()

    def tell(self, rank: int, what: str) -> None:
        stdin = self.processes[rank].stdin
        assert stdin is not None
        stdin.write(what + "\n")
        stdin.flush()

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def codes(self) -> list[int]:
        """Every rank's exit code, once all have ended, and their companions."""
        codes = [process.wait(60) for process in self.processes]
        _, alive = psutil.wait_procs(self.companions, timeout=30)
        assert not alive, "a companion outlives its rank"
        return codes

    def said(self, rank: int) -> str:
        return self.errors[rank].read_text()

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)


@contextmanager
def started(
    folder: Path,
    count: int = 3,
    address: str = "127.0.0.1",
    on: Callable[[int, list[str]], list[str]] = lambda rank, command: command,
) -> Iterator[Ranks]:
    ranks = Ranks(count, folder, address, on)
    try:
        yield ranks
    finally:
        for process in [*ranks.processes, *ranks.companions]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        for rank in ranks.processes:
            rank.wait()


def pause(generator: random.Random) -> None:
    """Into any phase of the heartbeats."""
    time.sleep(generator.uniform(0, 2 * TIMEOUT / 20))


@pytest.fixture(params=[2, pytest.param(20, marks=pytest.mark.slow)], ids=lambda trials: f"{trials} trials")
def trials(request: pytest.FixtureRequest) -> Iterator[tuple[int, random.Random]]:
    generator = random.Random(request.param)
    return ((number, generator) for number in range(request.param))


def check_line(text: str, cause: str, rank: int) -> None:
    """One line for the user, with the cause and who ends."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert re.fullmatch(f"error: {cause}; rank {rank} ends", lines[0]), text


def test_a_killed_rank_ends_all(trials: Iterator[tuple[int, random.Random]], tmp_path: Path) -> None:
    for number, generator in trials:
        victim = number % 3
        with started(tmp_path / str(number)) as ranks:
            pause(generator)
            ranks.signal(victim, signal.SIGKILL)
            if number % 2:  # what gloo tells a survivor, if it is still there, is not the cause
                with suppress(BrokenPipeError):
                    ranks.tell((victim + 1) % 3, "lose")
            codes = ranks.codes()
            assert codes == [-signal.SIGKILL if rank == victim else LOST for rank in range(3)]
            for rank in range(3):
                check_line(ranks.said(rank), rf"rank {victim} \(pid \d+, host host{victim}\) ended without .*", rank)


def test_a_frozen_rank_ends_all(trials: Iterator[tuple[int, random.Random]], tmp_path: Path) -> None:
    for number, generator in trials:
        victim = number % 3
        with started(tmp_path / str(number)) as ranks:
            pause(generator)
            ranks.signal(victim, signal.SIGSTOP)
            codes = ranks.codes()
            assert codes == [-signal.SIGKILL if rank == victim else LOST for rank in range(3)]
            cause = rf"rank {victim} \(pid \d+, host host{victim}\) has been frozen for [23] s"
            for rank in range(3):
                check_line(ranks.said(rank), cause, rank)


def test_a_failure_is_told_to_all(trials: Iterator[tuple[int, random.Random]], tmp_path: Path) -> None:
    for number, generator in trials:
        victim = number % 3
        with started(tmp_path / str(number)) as ranks:
            pause(generator)
            if number % 2:  # the consequence is heard before the cause
                ranks.tell((victim + 2) % 3, "lose")
            ranks.tell(victim, "fail")
            assert ranks.codes() == [3, 3, 3], "all exit with the code of the first failure"
            assert ranks.said(victim) == "error: a shard is not there\n", "its own message only"
            for rank in {0, 1, 2} - {victim}:
                check_line(ranks.said(rank), rf"rank {victim} \(.*\) failed: a shard is not there", rank)


def test_a_machine_that_stands_still_ends_all_others(
    trials: Iterator[tuple[int, random.Random]], tmp_path: Path
) -> None:
    """A rank and its companion are stopped together, as in a paused virtual machine."""
    for number, generator in trials:
        victim = number % 3
        with started(tmp_path / str(number)) as ranks:
            pause(generator)
            ranks.companions[victim].suspend()
            ranks.signal(victim, signal.SIGSTOP)
            others = [rank for rank in range(3) if rank != victim]
            assert [ranks.processes[rank].wait(60) for rank in others] == [LOST, LOST]
            for rank in others:
                check_line(ranks.said(rank), rf"no word from rank {victim} \(.*\) for \d+ s: its machine .*", rank)
            ranks.companions[victim].resume()
            ranks.signal(victim, signal.SIGCONT)
            assert ranks.codes()[victim] == LOST, "it ends as well once it goes on"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_cut_link_ends_both_sides(trials: Iterator[tuple[int, random.Random]], tmp_path: Path) -> None:
    with two_hosts() as hosts:
        for number, generator in trials:
            hosts.mend()
            with started(tmp_path / str(number), 2, ADDRESSES[0], hosts.on) as ranks:
                pause(generator)
                hosts.cut()
                assert ranks.codes() == [LOST, LOST]
                check_line(ranks.said(0), r"no word from rank 1 \(.*host host1\) for \d s: its machine .*", 0)
                check_line(ranks.said(1), r"no word from rank 0 \(host host0\) for \d s: its machine .*", 1)


def test_ranks_leave_one_after_the_other(trials: Iterator[tuple[int, random.Random]], tmp_path: Path) -> None:
    for number, generator in trials:
        order = generator.sample(range(3), 3)
        with started(tmp_path / str(number)) as ranks:
            for rank in order:
                pause(generator)
                assert ranks.processes[rank].poll() is None
                ranks.tell(rank, "leave")
            assert ranks.codes() == [0, 0, 0]
            assert [ranks.said(rank) for rank in range(3)] == ["", "", ""]


def test_healthy_ranks_are_left_alone(tmp_path: Path) -> None:
    """A long call into C that keeps the interpreter's lock, signals of a launcher, and a job stopped as a whole."""
    with started(tmp_path / "run") as ranks:
        ranks.tell(1, f"hold {0.6 * TIMEOUT}")
        for companion in ranks.companions:
            companion.send_signal(signal.SIGTERM)
            companion.send_signal(signal.SIGINT)
        assert ranks.heard(1) == "held\n"
        everyone = [*ranks.companions, *(psutil.Process(process.pid) for process in ranks.processes)]
        for process in everyone:
            process.suspend()
        time.sleep(2 * TIMEOUT)
        for process in everyone:
            process.resume()
        time.sleep(TIMEOUT)
        assert ranks.alive(), [ranks.said(rank) for rank in range(3)]
        for rank in range(3):
            ranks.tell(rank, "leave")
        assert ranks.codes() == [0, 0, 0]


def test_a_rank_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with started(tmp_path / "run") as ranks:
        ranks.tell(1, "hang")
        assert ranks.codes() == [3, -signal.SIGKILL, 3]
        assert "did not end by itself and is killed" in ranks.said(1)


@pytest.mark.parametrize("victim", [0, 1])
def test_no_rank_goes_on_without_its_companion(victim: int, tmp_path: Path) -> None:
    with started(tmp_path / "run") as ranks:
        ranks.companions[victim].kill()
        assert ranks.codes() == [LOST] * 3
        assert f"the connection to rank {victim}" in ranks.said(2)
        assert "the companion process of this rank was killed" in ranks.said(victim)


def test_a_lost_peer_without_another_cause_is_the_cause(tmp_path: Path) -> None:
    with started(tmp_path / "run") as ranks:
        ranks.tell(2, "lose")
        assert ranks.codes() == [LOST] * 3
        for rank in range(3):
            check_line(
                ranks.said(rank), r"rank 2 \(.*\) waited for the others in vain, .*: Connection closed by peer", rank
            )


def test_strangers_are_turned_away(tmp_path: Path) -> None:
    with started(tmp_path / "run") as ranks:
        port = next(c.laddr.port for c in ranks.companions[0].net_connections() if c.status == "LISTEN")
        hello = b'{"token": "%s", "rank": %d, "pid": 1, "host": "x"}\n'
        for words in [
            hello % (b"wrong", 1),
            hello % (b"secret", 1),  # is here already
            hello % (b"secret", 99),
            b"GET / HTTP/1.1\r\n\r\n",
            b"[" * 70_000 + b"\n",
            b"x" * 200_000,
            b"\xff\xfe\n",
            b"3\n",
        ]:
            with socket.create_connection(("127.0.0.1", port), 20) as connection, suppress(ConnectionError):
                connection.sendall(words)
                assert connection.recv(100) == b"", "the hub answers no stranger, and hangs up"
        silent = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(20)]
        for rank in range(3):
            ranks.tell(rank, "leave")
        assert ranks.codes() == [0, 0, 0], os.linesep.join(ranks.said(rank) for rank in range(3))
        for connection in silent:
            connection.close()
