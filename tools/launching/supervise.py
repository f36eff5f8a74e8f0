"""Runs a launcher and speaks for it: passes signals on, waits a bounded time, says what became of the run.

Signals go to the ranks themselves, once. torchrun would send them to the ranks' helpers as well (a DataLoader's worker
dies of it, and its rank with it), gives up after 30 seconds before PyTorch 2.12, and at a second signal abandons its
ranks; DeepSpeed's launcher gives up after 30 seconds, one rank after the other.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import psutil

from trainers.status import EXIT_CODES, EXIT_REFUSED, Status, read_status

DONE, FAILED, LOST, PREEMPTED = (EXIT_CODES[state] for state in ("done", "failed", "lost", "preempted"))
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between fork and exec
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # Linux's prctl
_INTERVAL = 0.1  # seconds between two looks
_LAST_WORD = 10.0  # seconds that a status may take to arrive, over a shared file system


@dataclass(frozen=True)
class Outcome:
    code: int
    line: str  # for the user: what became of the run, its first cause, and what to do
    progressed: bool = False  # a checkpoint was written


class StopSignal:
    """Notes SIGTERM, SIGINT, SIGUSR1 and SIGHUP; a second SIGINT asks for the end at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.urgent = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._note)

    def request(self, reason: str) -> None:
        self.reason = self.reason or reason

    def watch_input(self) -> None:
        """Ask for the end when standard input ends: whoever holds the other side says so, or is gone."""

        def drain() -> None:
            while os.read(0, 4096):
                pass
            self.request("the end of its input")

        threading.Thread(target=drain, daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.urgent = self.urgent or (self.reason is not None and number == signal.SIGINT)
        self.request(signal.Signals(number).name)


@dataclass
class Child:
    """A started command; ``tell`` asks what it runs to stop."""

    process: subprocess.Popen[bytes]
    tell: Callable[[], None]


def start_local(command: Sequence[str], variables: dict[str, str], script: Path) -> Child:
    """torchrun or DeepSpeed's launcher on this machine, whose ranks run ``script``.

    It has a session of its own, so that Ctrl-C reaches this process alone, and gets SIGTERM if this process dies.
    """
    _prctl(_SET_CHILD_SUBREAPER, 1)  # ranks that outlive their launcher become ours to wait for
    process = subprocess.Popen(
        command,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(_SET_PDEATHSIG, signal.SIGTERM),
    )
    return Child(process, lambda: _tell_ranks(process, script))


def start_remote(command: Sequence[str]) -> Child:
    """ssh, whose other side stops when its input ends."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    return Child(process, process.stdin.close)


def supervise(
    start: Callable[[], list[Child]],
    run_dir: Path,
    stop: StopSignal,
    *,
    grace: float,
    settle: float,
    leads: bool = True,
) -> Outcome:
    """Start, and wait for the end of all; says what it was.

    Args:
        grace: seconds from a stop signal until what still runs is killed.
        settle: seconds that the others have to end once one child has failed.
        leads: rank 0 is among those started; otherwise its first word may have been before this call.
    """
    before = _status(run_dir)
    try:
        children = start()
    except OSError as error:
        return Outcome(FAILED, f"failed: {error}")
    in_time = _wait(children, stop, grace, settle)
    code = _worst([child.process.returncode for child in children])
    deadline = time.monotonic() + (0 if leads else _LAST_WORD)
    after = _status(run_dir)
    while code and (after is None or not after.ended) and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        after = _status(run_dir)
    if stop.urgent:
        return Outcome(
            128 + signal.SIGINT, "killed by a second SIGINT; the same command goes on from the last checkpoint"
        )
    stopped = stop.reason
    if stopped and not in_time:
        stopped += f", with no checkpoint within the {grace:g} seconds of --grace"
    return judge(code, before, after, stopped=stopped, leads=leads)


def _status(run_dir: Path) -> Status | None:
    """``status.json``, with the newest checkpoint as it lies there: a killed run may not have come to note it."""
    status = read_status(run_dir)
    last = run_dir / "checkpoints" / "last"
    if status is not None and last.is_symlink() and last.exists():
        return replace(status, checkpoint=last.readlink().name)
    return status


def judge(
    code: int, before: Status | None, after: Status | None, *, stopped: str | None = None, leads: bool = True
) -> Outcome:
    """What became of a run: by the launcher's exit code, and the status before and after it.

    A status that is the same as before was written by an earlier run, and says nothing. ``stopped`` is why this
    process asked for the end, if it did.
    """
    where = f" (checkpoint {after.checkpoint})" if after is not None and after.checkpoint else ""
    progressed = after is not None and after.checkpoint != (before.checkpoint if before else None)
    on = "the same command goes on from the last checkpoint" if where else "the same command starts again"
    if code == 0:
        return Outcome(DONE, f"done{where}", progressed)
    fresh = after is not None and (after != before or (not leads and after.state == "running"))
    cause: str | None = None
    if after is not None and fresh and after.ended:
        cause = after.cause
        code = EXIT_CODES[after.state] if after.exit_code is None else after.exit_code
        if code == FAILED and stopped:  # it may have failed of being stopped
            code = LOST
    elif code not in (EXIT_REFUSED, LOST, PREEMPTED):  # those were passed through
        if stopped or fresh:
            code = LOST
            cause = None if stopped else "rank 0 ended without a word: killed, or out of memory"
        else:
            cause = f"the launcher ended with exit code {code}; see above"
            code = 128 - code if code < 0 else code
    if code == PREEMPTED:
        return Outcome(code, f"preempted by {stopped or 'a signal to a rank'}{where}; {on}", progressed)
    if code == LOST:
        cause = cause or (f"stopped by {stopped}" if stopped else "see above")
        return Outcome(code, f"lost{where}: {cause}; {on}", progressed)
    return Outcome(
        code, f"{'refused' if code == EXIT_REFUSED else 'failed'}{where}: {cause or 'see above'}", progressed
    )


def _wait(children: list[Child], stop: StopSignal, grace: float, settle: float) -> bool:
    """Until every child and what it left behind is gone; False if some had to be killed."""
    told_at = failed_at = None
    while alive := [child for child in children if child.process.poll() is None]:
        now = time.monotonic()
        if failed_at is None and any(child.process.returncode for child in children):
            failed_at = now
        if told_at is None and (stop.reason or (failed_at is not None and now - failed_at > settle)):
            told_at = now
            for child in alive:
                child.tell()
        if stop.urgent or (told_at is not None and now - told_at > grace):
            _kill(alive)
            return False
        time.sleep(_INTERVAL)
    end = time.monotonic() + (grace if stop.reason else _LAST_WORD)
    if told_at is not None:
        end = told_at + grace
    while _descendants():
        if time.monotonic() > end or stop.urgent:
            _kill(children)
            return False
        time.sleep(_INTERVAL)
    return True


def _tell_ranks(process: subprocess.Popen[bytes], script: Path) -> None:
    """SIGTERM to every rank; to the launcher if it has none yet."""
    found = {p.pid: p for p in _descendants() if _runs(p, script)}
    ranks = 0
    for rank in found.values():
        with suppress(psutil.NoSuchProcess):
            if rank.ppid() not in found:
                rank.send_signal(signal.SIGTERM)
                ranks += 1
    if not ranks and process.poll() is None:
        process.terminate()


def _runs(process: psutil.Process, script: Path) -> bool:
    """Whether it is ``python -u script …``, as both launchers start a rank."""
    try:
        return process.cmdline()[1:3] == ["-u", str(script)]
    except psutil.Error:
        return False


def _descendants() -> list[psutil.Process]:
    """All living processes below this one. None is reaped here: that would take the exit code from its Popen."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _kill(children: list[Child]) -> None:
    for process in _descendants():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for child in children:
        child.process.wait()


def _worst(codes: list[int]) -> int:
    """Of several children's: a refusal or failure that was passed through, before a loss, before a preemption."""
    for code in (EXIT_REFUSED, FAILED):
        if code in codes:
            return code
    return next((code for code in (LOST, PREEMPTED) if code in codes), next((code for code in codes if code), 0))


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)
