"""What companions say, and how it travels."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

LOST = 69  # EX_UNAVAILABLE: a peer or the link was lost; the same command goes on from the last checkpoint
LONGEST_LINE = 1 << 16
GONE = "ended without a word: killed (out of memory?) or crashed"
BROKEN = "broke: it was killed, or its machine went down"
SILENT = "its machine or the network is gone or frozen"

Message = dict[str, Any]


class Lines:
    """Messages over a pair of file descriptors; never blocks. ``ended`` once the other side is gone."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink, self.ended = source, sink, False
        self._unread, self._unsent = b"", b""
        for descriptor in (source, sink):
            os.set_blocking(descriptor, False)

    def receive(self) -> list[Message]:
        try:
            data = os.read(self.source, LONGEST_LINE)
            self.ended = self.ended or not data
        except BlockingIOError:
            return []
        except OSError:
            self.ended = True
            return []
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if len(self._unread) > LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            self.ended = True  # no companion talks like that
            return []
        return messages

    def send(self, message: Message) -> None:
        """Write what fits; the rest goes with the next message."""
        if self.ended:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.sink, self._unsent) :]
        except BlockingIOError:
            self.ended = self.ended or len(self._unsent) > 16 * LONGEST_LINE
        except OSError:
            self._unsent = b""  # that the other side is gone is noticed by reading


def promptly(connection: socket.socket) -> socket.socket:
    """The same connection, which sends small messages without waiting for more."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def announce(text: str) -> None:
    """Print to stderr in one write, so that the lines of several ranks do not mix."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))
