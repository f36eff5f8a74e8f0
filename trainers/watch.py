"""Watching over the ranks of one run, so that none waits for another that will not come.

Each rank starts a companion process (``trainers/companion``), which finds out if any rank or the link between them
is frozen or gone, prints the first cause once, and ends its rank. A collective that fails here is often only the
consequence of what happened elsewhere: ``failures_reported`` turns it into a ``LostPeerError`` that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from trainers.companion.addresses import own_addresses
from trainers.companion.lines import LOST
from trainers.companion.rank import GRACE, LostPeerError, Watch, one_line
from trainers.stopping import StopSignal

EXIT_LOST = LOST
_FAILED, _HUB = "watch/failed", "watch/hub"
_SIGNS = ("gloo/", "NCCL", "ncclSystemError", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")

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
                _leave_word(open_store(3)[0], cause, code)


def before_end(call: Callable[[str, int], None]) -> None:
    """Have ``call(cause, exit code)`` run if the watch ends this process while it waits for a lost peer."""
    if _watch is not None:
        _watch.before_end.append(call)


def open_store(patience: float) -> tuple[dist.Store, int, int]:
    """The launcher's rendezvous: where ranks find each other, this one's number, and how many they are.

    Raises:
        LostPeerError: not all came within ``patience`` seconds.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    except dist.DistError as error:
        reason = one_line(str(error)).partition("; ")[0]
        raise LostPeerError(f"not all ranks came within {patience:g} s (engine.start_timeout): {reason}") from None
    store.set_timeout(timedelta(seconds=patience))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max-restarts: the same store again
    return dist.PrefixStore(f"attempt-{attempt}", store), rank, world_size


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
    _begun = True
    StopSignal.tell = staticmethod(report_failure)
    watch = _watch = _start(store, rank, world_size, timeout, patience, port)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # train.py's StopSignal stays: it answers with a checkpoint
        signal.signal(signal.SIGTERM, _end_with_the_cause)
    try:
        yield
    finally:
        _watch = None
        if watch.leaving:  # a failure: the companion stays until this process is gone, and sees to it that it goes
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a handler would not outlast the interpreter's own end
        else:
            watch.close()
            if signal.getsignal(signal.SIGTERM) is _end_with_the_cause:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _start(store: dist.Store, rank: int, world_size: int, timeout: float, patience: float, port: int) -> Watch:
    """Start this rank's companion, and wait until it is connected; rank 0's, until all are."""
    settings = {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "timeout": timeout,
        "grace": GRACE,
        "interval": min(2.0, timeout / 20),
    }
    try:
        if rank == 0:
            token = secrets.token_hex(16)
            watch = Watch({**settings, "token": token, "port": port})
            chosen = watch.await_first_word("port")
            hub = {"addresses": own_addresses(), "port": chosen, "token": token, "host": settings["host"]}
            store.set(_HUB, json.dumps(hub))
            _await(store, patience, watch.complete.is_set, "not all ranks came", watch)
        else:
            _await(store, patience, lambda: store.check([_HUB]), "rank 0 did not come")
            hub = json.loads(store.get(_HUB))
            watch = Watch({**settings, "token": hub["token"], "hub": hub})
            watch.await_first_word("connected")
    except dist.DistError:
        raise LostPeerError("rank 0 left before all ranks had joined; its own message says why") from None
    except LostPeerError as error:
        if not error.printed and error.code == 2:
            with contextlib.suppress(dist.DistError):
                _leave_word(store, str(error), error.code)
            time.sleep(2)  # the store may be this process's; the others read it
        raise
    return watch


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
            refused = isinstance(error, refusals)
            if not hasattr(error, "exit_code"):  # typer.Exit: all ranks leave alike
                told = refused or hasattr(error, "for_user")
                report_failure(str(error) if told else f"{type(error).__name__}: {error}", 2 if refused else 1)
            raise
        raise _watch.explain(RuntimeError(re.sub(r"\[\S+:\d+\] *", "", str(error)))) from None
    except BaseException as error:
        report_failure(f"stopped by {type(error).__name__}")
        raise


def _end_with_the_cause(number: int, frame: FrameType | None) -> None:
    """Launchers end the other ranks by SIGTERM when one is gone; the watch ends them too, and knows why."""
    if _watch is None or _watch.leaving or _watch.told.wait(1.0):
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_consequence(error: BaseException) -> bool:
    """Whether a collective failed for want of a peer, rather than this rank's own work."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _await(store: dist.Store, patience: float, come: Callable[[], bool], late: str, watch: Watch | None = None) -> None:
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
        raise LostPeerError(str(error), getattr(error, "code", EXIT_LOST)) if watch is None else watch.explain(error)


def _leave_word(store: dist.Store, cause: str, code: int) -> None:
    """For those who wait: this rank fails before it has joined."""
    who = f"rank {os.environ.get('RANK', '?')} (pid {os.getpid()}, host {socket.gethostname()})"
    store.set(_FAILED, json.dumps([who, one_line(cause), code]))
