"""Stopping a run from outside: SIGTERM, SIGINT and SIGUSR1, at any moment. Imports nothing slow."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint was written, the same command goes on from it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Notes a signal that asks the process to stop, to be acted on between steps; a second SIGINT interrupts at once.

    Until ``begin`` there is nothing to save: the process then ends at once, even while it waits inside a library for
    a file or another rank, when Python's own handlers do not run. Signals belong to the process, hence ``installed``;
    it stays to the process's end, so that a second SIGTERM cannot take the place of the exit code.
    """

    _installed: StopSignal | None = None
    tell: Callable[[str, int], None] | None = None  # the other ranks, of an end before `begin`: why, and the code

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0  # monotonic seconds of the first signal
        self.name = "a signal on another rank"
        self._starting = True
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._end_while_starting, name="twinstream-stop", daemon=True).start()
        for number in SIGNALS:  # last: a signal caught before the thread listens would only be noted
            signal.signal(number, self._note)

    @classmethod
    def installed(cls) -> StopSignal:
        """The process's own, made at the first call, which must come from the main thread."""
        if cls._installed is None:
            cls._installed = cls()
        return cls._installed

    def begin(self) -> None:
        """From here on there is something to save, and signals are only noted."""
        self._starting = False

    def seconds(self) -> float:
        """Since the first signal; 0 if this process got none."""
        return time.monotonic() - self.since if self.requested else 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._starting:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.since, self.name = True, time.monotonic(), signal.Signals(number).name

    def _end_while_starting(self) -> None:
        while self._starting:
            (number,) = self._read.recv(1)
            if self._starting and number in SIGNALS:
                name = signal.Signals(number).name
                sys.stderr.write(
                    f"stopped by {name} before the first step: nothing to save, the same command starts again\n"
                )
                sys.stderr.flush()
                if StopSignal.tell is not None:
                    StopSignal.tell(f"stopped by {name} before the first step", EXIT_PREEMPTED)
                os._exit(EXIT_PREEMPTED)

    def _forked(self) -> None:
        if StopSignal._installed is self:  # a worker's signals are not its parent's
            signal.set_wakeup_fd(-1)
