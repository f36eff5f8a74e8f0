"""The rank's end of the pipe to its companion: starts it, proves the rank alive, hears the verdict."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trainers.companion.hub import HOLD
from trainers.companion.lines import LOST, Lines

GRACE = 5.0  # seconds that a rank has to end by itself before its companion kills it
LONGEST_CAUSE = 500  # characters
_START = "import sys; sys.path.append({root!r}); from trainers.companion.process import main; main()"


class LostPeerError(RuntimeError):
    """Another rank, or the link to it, failed first; ``code`` is what this process exits with.

    ``printed``: the companion has shown the message already.
    """

    def __init__(self, cause: str, code: int = LOST, printed: bool = False) -> None:
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
            [sys.executable, "-I", "-S", "-c", _START.format(root=str(Path(__file__).parents[2]))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings).encode() + b"\n")
        self._process.stdin.flush()
        self._lines = Lines(self._process.stdout.fileno(), self._process.stdin.fileno())
        self._poll = select.poll()  # select() refuses descriptors above 1023
        self._poll.register(self._lines.source, select.POLLIN)

    def await_first_word(self, key: str) -> Any:
        """What the companion says once it listens (rank 0) or is connected; only then is the rank watched.

        Raises:
            LostPeerError: it cannot, and says why.
        """
        while True:
            self._poll.poll()
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
        self.say(failed=one_line(cause), code=code)

    def explain(self, error: BaseException) -> LostPeerError:
        """Why a collective failed here: what happened first, wherever that was."""
        self.leaving = True
        if isinstance(error, LostPeerError):
            self.say(cause=one_line(str(error)), code=error.code)
        else:
            self.say(lost=one_line(str(error)))
        self.told.wait(HOLD + self._timeout)
        return self.verdict or LostPeerError(one_line(str(error)))

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
            ready = self._poll.poll(500 * self._interval)
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
        exit_at_once(verdict.code)


def exit_at_once(code: int) -> NoReturn:
    """Exit without the interpreter's own end, in which libraries may wait for a rank that is gone."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:LONGEST_CAUSE]
