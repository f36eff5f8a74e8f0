"""Watching over the ranks of one run, so that none waits for another that will not come.

Each rank starts a companion process (``trainers/companion.py``), which finds out if any rank or the link between them
is frozen or gone, prints the first cause once, and ends its rank. A collective that fails here is often only the
consequence of what happened elsewhere: ``failures_reported`` turns it into a ``LostPeerError`` that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers.companion.hub import HOLD
from trainers.companion.lines import LOST, Lines

EXIT_LOST = LOST
GRACE = 5.0  # seconds that a rank has to end by itself before its companion kills it
LONGEST_CAUSE = 500  # characters
_START = "import sys; sys.path.append({root!r}); from trainers.companion.process import main; main()"
_FAILED, _HUB = "watch/failed", "watch/hub"
_SIGNS = ("gloo/", "NCCL", "ncclSystemError", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


class LostPeerError(RuntimeError):
    """Another rank, or the link to it, failed first; ``code`` is what this process exits with.

    ``printed``: the companion has shown the message already.
    """

    def __init__(self, cause: str, code: int = EXIT_LOST, printed: bool = False) -> None:
        super().__init__(cause)
        self.code, self.printed = code, printed


class Watch:
    """This rank's end of the pipe to its companion: a thread that proves the rank alive and hears the verdict."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.complete = threading.Event()  # rank 0: every rank's companion is connected
        self.told = threading.Event()
        self.verdict: LostPeerError | None = None
        self.before_end: list[Callable[[str, int], None]] = []
        self._timeout, self._interval = settings["timeout"], settings["interval"]
        self.leaving = False  # the main thread is on its way out, and prints and exits itself
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START.format(root=str(Path(__file__).parents[1]))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings).encode() + b"\n")
        self._process.stdin.flush()
        self._lines = Lines(self._process.stdout.fileno(), self._process.stdin.fileno())

    def await_first_word(self, key: str) -> Any:
        """What the companion says once it listens (rank 0) or is connected; only then is the rank watched.

        Raises:
            LostPeerError: it cannot, and says why.
        """
        while True:
            select.select([self._lines.source], [], [])
            for message in self._lines.receive():
                if "refused" in message:
                    raise LostPeerError(message["refused"], code=2)
                if key in message:
                    threading.Thread(target=self._keep_alive, name="watch", daemon=True).start()
                    return message[key]
            if self._lines.ended:
                raise LostPeerError("the companion of this rank did not start")

    def say(self, **message: Any) -> None:
        with self._lock:
            self._lines.send(message)

    def fail(self, cause: str, code: int) -> None:
        self.leaving = True
        self.say(failed=_one_line(cause), code=code)

    def explain(self, error: BaseException) -> LostPeerError:
        """Why a collective failed here: what happened first, wherever that was."""
        self.leaving = True
        if isinstance(error, LostPeerError):
            self.say(cause=_one_line(str(error)), code=error.code)
        else:
            self.say(lost=_one_line(str(error)))
        self.told.wait(HOLD + self._timeout)
        return self.verdict or LostPeerError(_one_line(str(error)))

    def close(self) -> None:
        """This rank has done its part."""
        self.leaving = True
        self.say(bye=True)
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError):
            self._lines.ended = True  # the thread writes no more
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)

    def _keep_alive(self) -> None:
        """A heartbeat every interval, until the companion has a verdict or is gone itself."""
        tick, silence, sent = time.monotonic(), 0.0, 0.0
        while not self.told.is_set():
            try:
                ready, _, _ = select.select([self._lines.source], [], [], self._interval / 2)
            except (OSError, ValueError):
                return  # closed
            now = time.monotonic()
            # Time in which this thread did not run is not the companion's.
            silence = 0.0 if ready else silence + min(now - tick, self._interval)
            tick = now
            for message in self._lines.receive() if ready else []:
                if "verdict" in message:
                    self._end(LostPeerError(message["verdict"], message["code"], printed=True))
                elif "complete" in message:
                    self.complete.set()
            if self._lines.ended and self.leaving:
                return
            if self._lines.ended or silence > self._timeout:
                self._end(LostPeerError("the companion process of this rank was killed or is frozen"))
            elif now - sent >= self._interval / 2:
                self.say()
                sent = now

    def _end(self, verdict: LostPeerError) -> None:
        """End this process from here: the main thread may be waiting in a collective that never ends."""
        self.verdict = verdict
        self.told.set()
        if self.leaving:
            return
        if not verdict.printed:
            print(f"error: {verdict}", file=sys.stderr)
        for call in self.before_end:
            with contextlib.suppress(Exception):
                call(str(verdict), verdict.code)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(verdict.code)


_watch: Watch | None = None
_begun = False  # the watch has been up in this process


def report_failure(cause: str, code: int = 1) -> None:
    """Tell all other ranks that this one fails, and why, before it exits with ``code``; they exit with it as well.

    Does nothing in a run of one rank. Before the ranks have joined, those that wait for this one are told if the
    rendezvous answers within seconds.
    """
    if _watch is not None:
        _watch.fail(cause, code)
    elif not _begun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Without torchrun rank 0 would have to open the store itself: then there is nobody to tell.
        known = os.environ.get("RANK") != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        with contextlib.suppress(Exception):  # nobody may be there yet, or ever
            if known:
                store = next(dist.rendezvous("env://", timeout=timedelta(seconds=3)))[0]
                store.set(_FAILED, json.dumps([_describe_rank(), _one_line(cause), code]))


def before_end(call: Callable[[str, int], None]) -> None:
    """Have ``call(cause, exit code)`` run if the watch ends this process while it waits for a lost peer."""
    if _watch is not None:
        _watch.before_end.append(call)


@contextmanager
def watched(
    store: dist.Store, rank: int, world_size: int, *, timeout: float, patience: float, port: int
) -> Iterator[None]:
    """Watch over this rank and all others from here to the end of the block.

    Args:
        timeout: seconds after which a rank or a link that gives no sign of life is lost.
        patience: seconds that ranks wait for each other to come.
        port: where rank 0's companion listens; 0 is any free port.

    Raises:
        LostPeerError: a rank did not come or cannot be reached, or failed before it came.
    """
    global _watch, _begun
    settings = {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "timeout": timeout,
        "grace": GRACE,
        "interval": min(2.0, timeout / 20),
    }
    _begun = True
    if rank == 0:
        token = secrets.token_hex(16)
        watch = Watch({**settings, "token": token, "port": port})
        chosen = watch.await_first_word("port")
        hub = {"addresses": _own_addresses(), "port": chosen, "token": token, "host": settings["host"]}
        store.set(_HUB, json.dumps(hub))
        _watch = watch
        _await(store, patience, watch.complete.is_set, "not all ranks came")
    else:
        _await(store, patience, lambda: store.check([_HUB]), "rank 0 did not come")
        hub = json.loads(store.get(_HUB))
        watch = Watch({**settings, "token": hub["token"], "hub": hub})
        watch.await_first_word("connected")
        _watch = watch
    try:
        yield
    finally:  # after a failure the companion stays until this process is gone
        _watch = None
        if not watch.leaving:
            watch.close()


@contextmanager
def failures_reported(refusals: tuple[type[Exception], ...]) -> Iterator[None]:
    """What fails in this block is told to the other ranks first.

    Args:
        refusals: exceptions that mean refused input, for which the process exits with 2, not 1.

    Raises:
        LostPeerError: in place of an exception that is only the consequence of another rank's failure.
    """
    try:
        yield
    except LostPeerError:
        raise
    except Exception as error:
        if _watch is None or not _is_consequence(error):
            if not hasattr(error, "exit_code"):  # typer.Exit: all ranks leave alike
                report_failure(str(error) or type(error).__name__, 2 if isinstance(error, refusals) else 1)
            raise
        raise _watch.explain(error) from None
    except BaseException as error:
        report_failure(f"stopped by {type(error).__name__}")
        raise


def _is_consequence(error: BaseException) -> bool:
    """Whether a collective failed for want of a peer, rather than this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _await(store: dist.Store, patience: float, come: Callable[[], bool], late: str) -> None:
    """Wait for others at the start; one that failed before it came is not waited for."""
    deadline, pause = time.monotonic() + patience, 0.02
    while not come():
        if store.check([_FAILED]):
            who, cause, code = json.loads(store.get(_FAILED))
            error: RuntimeError = LostPeerError(f"{who} failed: {cause}", code)
        elif time.monotonic() > deadline:
            error = RuntimeError(f"{late} within {patience:g} s (engine.start_timeout)")
        else:
            time.sleep(pause)
            pause = min(1.0, pause * 1.2)
            continue
        raise LostPeerError(str(error), getattr(error, "code", EXIT_LOST)) if _watch is None else _watch.explain(error)


def _own_addresses() -> list[str]:
    """Where other machines may find this one, best first."""
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # the network that the user chose
        name = os.environ.get(variable, "").lstrip("=^").split(",")[0]
        with contextlib.suppress(OSError):
            found.append(_interface_address(name))
    master = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: the system picks the address to go out from
                own = str(probe.getsockname()[0])
            found.append(own)
            if own == address[0]:  # the rendezvous is on this machine: the others know how to find it
                found.append(master)
    found.append(socket.gethostname())
    return list(dict.fromkeys(found))


def _interface_address(name: str) -> str:
    """The IPv4 address of a network interface of Linux."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])


def _describe_rank() -> str:
    return f"rank {os.environ.get('RANK', '?')} (pid {os.getpid()}, host {socket.gethostname()})"


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:LONGEST_CAUSE]
