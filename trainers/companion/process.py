"""One rank's companion: the rank on one side, the network on the other."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Callable

from trainers.companion.hub import Hub
from trainers.companion.lines import GONE, Lines, Message, announce
from trainers.companion.spoke import Spoke

LINGER = 2.0  # seconds in which the last messages are delivered


class Companion:
    """One rank's companion: its rank on one side, the hub's or a spoke's network on the other."""

    def __init__(self, settings: Message) -> None:
        self.rank: int = settings["rank"]
        self.pid: int = settings["pid"]
        self.host: str = settings["host"]
        self.world_size: int = settings["world_size"]
        self.token: str = settings["token"]
        self.timeout: float = settings["timeout"]
        self.grace: float = settings["grace"]
        self.interval: float = settings["interval"]
        self.now = 0.0  # seconds that this process has lived through
        self._tick = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.pipe = Lines(0, 1)
        self.listen(self.pipe.source, self._hear_rank)
        self._beat = 0.0  # when the rank was last heard
        self._sent = self._checked = 0.0
        self._excused = self._frozen = False  # the rank said why it leaves; it says nothing at all
        self._said: str | None = None  # what the rank said of its own failure, and prints itself
        self._kill_at: float | None = None  # once the verdict has fallen
        self._end = float("inf")  # when this process ends, come what may
        self.left = self.over = False  # the rank has said goodbye; the watch has ended for all
        self.network: Hub | Spoke = Hub(self, settings["port"]) if self.rank == 0 else Spoke(self, settings["hub"])

    def listen(self, descriptor: int, call: Callable[[], None]) -> None:
        self.selector.register(descriptor, selectors.EVENT_READ, call)

    def run(self) -> None:
        while self.now < self._end and not (self._end < float("inf") and self.network.delivered()):
            for key, _ in self.selector.select(self.interval / 2):
                key.data()
            real, self._tick = time.monotonic() - self._tick, time.monotonic()
            self.now += min(real, max(1.0, 2 * self.interval))
            if self.now - self._checked >= self.interval / 4:  # not for each of a thousand heartbeats
                self._checked = self.now
                self._check_rank()
                self.network.check()
            if self.now - self._sent >= self.interval:
                self._sent = self.now
                self.pipe.send({})
                self.network.beat()
        if self._kill_at is None and not (self._excused or self.over):
            announce(f"error: {self.name()} {GONE}")  # nobody was left to say it

    def judge(self, text: str, code: int, culprit: int) -> None:
        """The first cause is known: print it, tell the rank, and see to it that the rank ends."""
        if self._kill_at is not None or self.over:
            return
        self._kill_at = self.now + (0 if self._frozen else self.grace)
        if self._said is None or (culprit != self.rank and self._said not in text):
            announce(f"error: {text}; rank {self.rank} ends")
        self.pipe.send({"verdict": text, "code": code})
        if self.pipe.ended:
            self.finish()

    def finish(self) -> None:
        """Nothing is left to do but to deliver what was said."""
        self._end = min(self._end, self.now + LINGER)

    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid}, host {self.host})"

    def _hear_rank(self) -> None:
        messages = self.pipe.receive()
        self._beat = self.now
        for message in messages:
            if "failed" in message:
                self._said = message["failed"]
            self.left = self.left or "bye" in message
            self._excused = self._excused or bool(message)
            if message and not self.over:
                self.network.report(message)
        if self.pipe.ended:
            self._lose_rank()

    def _lose_rank(self) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(self.pipe.source)
        if not self._excused and not self.over and self._kill_at is None:
            self.network.report({"gone": True})
        self.finish()

    def _check_rank(self) -> None:
        if self._end < float("inf"):
            return
        if os.getppid() != self.pid:  # its workers may hold the pipe open
            self._lose_rank()
        elif self._kill_at is not None and self.now >= self._kill_at:
            if not self._frozen:
                announce(f"{self.name()} did not end by itself and is killed")
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)  # ends a stopped process as well
            self.finish()
        elif not self._frozen and not self.over and self.now - self._beat > self.timeout:
            self._frozen = True
            self.network.report({"frozen": round(self.now - self._beat)})


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the rank
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    Companion(json.loads(line)).run()
