"""Any other rank's companion: one connection, to the hub."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING

from trainers.companion.lines import BROKEN, LOST, SILENT, Lines, Message, promptly

if TYPE_CHECKING:
    from trainers.companion.process import Companion


ANSWER = 10.0  # seconds for which the hub is waited for at one address; it may have a thousand to answer


class Spoke:
    """Any other rank's network: one connection, to the hub."""

    def __init__(self, companion: Companion, hub: Message) -> None:
        self.companion, self._hub = companion, f"rank 0 (host {hub['host']})"
        self._heard, self._quiet = companion.now, False
        self._socket = self._connect(hub)
        self._lines = Lines(self._socket.fileno(), self._socket.fileno())
        companion.listen(self._socket.fileno(), self._hear)

    def report(self, message: Message) -> None:
        self._lines.send(message)
        if "bye" in message:
            self.companion.finish()

    def check(self) -> None:
        if not self._quiet and self.companion.now - self._heard > self.companion.timeout:
            silence = self.companion.now - self._heard
            self._stop(f"no word from {self._hub} for {silence:.0f} s: {SILENT}")

    def beat(self) -> None:
        self._lines.send({})

    def delivered(self) -> bool:
        return self._quiet

    def _hear(self) -> None:
        self._heard = self.companion.now
        for message in self._lines.receive():
            if "verdict" in message:
                self._quiet = True
                self.companion.judge(message["verdict"], message["code"], message["culprit"])
            elif "over" in message:
                self._quiet = self.companion.over = True
        if self._quiet:
            self._hang_up()
        elif self._lines.ended:
            self._hang_up()
            self._stop(f"the connection to {self._hub} {BROKEN}")

    def _stop(self, text: str) -> None:
        self._quiet = True
        if not self.companion.left:
            self.companion.judge(text, LOST, 0)

    def _hang_up(self) -> None:
        self.companion.selector.unregister(self._socket.fileno())
        self._socket.close()
        self._lines.ended = True

    def _connect(self, hub: Message) -> socket.socket:
        """Try the hub's addresses in turn until one lets us in, for ``timeout`` seconds."""
        hello = {name: getattr(self.companion, name) for name in ("token", "rank", "pid", "host")}
        deadline = time.monotonic() + self.companion.timeout
        reason = "no address"
        while os.getppid() == self.companion.pid:
            for address in hub["addresses"]:
                try:
                    connection = socket.create_connection((address, hub["port"]), ANSWER)
                    connection.sendall(json.dumps(hello).encode() + b"\n")
                    if connection.recv(64, socket.MSG_PEEK):
                        self.companion.pipe.send({"connected": True})
                        return promptly(connection)
                    reason = f"{address} turned it away"
                except OSError as error:
                    reason = f"{address}: {error}"
            if time.monotonic() > deadline:
                where = " or ".join(hub["addresses"])
                text = f"{self._hub} cannot be reached at {where}, port {hub['port']} ({reason})"
                self.companion.pipe.send({"refused": text})
                break
            time.sleep(0.1)
        raise SystemExit(1)
