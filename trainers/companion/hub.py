"""Rank 0's companion is the hub: all others connect to it, and it decides what went wrong first."""

from __future__ import annotations

import contextlib
import hmac
import resource
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainers.companion.lines import BROKEN, GONE, LOST, SILENT, Lines, Message, promptly

if TYPE_CHECKING:
    from trainers.companion.process import Companion

HOLD = 3.0  # seconds for which "I lost a peer" waits for the reason why
GREETING = 10.0  # seconds in which a new connection must say who it is


class Peer:
    """A connection that the hub accepted."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.socket, self.heard = connection, now
        self.lines = Lines(connection.fileno(), connection.fileno())
        self.rank: int | None = None  # until it has said who it is
        self.pid, self.host, self.left = 0, "", False

    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid}, host {self.host})"


class Hub:
    """Rank 0's network: hears all, decides once."""

    def __init__(self, companion: Companion, port: int) -> None:
        self.companion = companion
        self.peers: list[Peer] = []
        self._lost: tuple[float, str] | None = None  # when a rank said that it lost its peers, and what it said
        self._decided = False
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each rank
        try:
            self._server = _listen(port)
        except OSError as error:
            companion.pipe.send({"refused": f"engine.watch_port={port} cannot be used on {companion.host}: {error}"})
            raise SystemExit(1) from None
        companion.listen(self._server.fileno(), self._accept)
        companion.pipe.send({"port": self._server.getsockname()[1]})

    def report(self, message: Message, peer: Peer | None = None) -> None:
        """Something that a rank or its companion says; ``peer`` is None for rank 0's."""
        rank, who = (0, self.companion.name()) if peer is None else (peer.rank or 0, peer.name())
        if "failed" in message:
            self._decide(f"{who} failed: {message['failed']}", message["code"], rank)
        elif "cause" in message:
            self._decide(message["cause"], message["code"], -1)
        elif "gone" in message:
            self._decide(f"{who} {GONE}", LOST, rank)
        elif "frozen" in message:
            self._decide(f"{who} has been frozen for {message['frozen']} s", LOST, rank)
        elif "lost" in message and self._lost is None:
            # Why is mostly known within moments; if not, a rank is alive but not where the others are.
            text = f"{who} waited for the others in vain, none of them known to be gone: {message['lost']}"
            self._lost = (self.companion.now, text + self._missing())
        elif "bye" in message and peer is None:
            self._close()
        elif "bye" in message and peer is not None:
            peer.left = True
            peer.lines.send({"over": True})

    def check(self) -> None:
        now = self.companion.now
        for peer in [p for p in self.peers if p.rank is None and now - p.heard > GREETING]:
            self._drop(peer)
        if self._decided or self.companion.over:
            return
        if self._lost is not None and now - self._lost[0] > HOLD:
            self._decide(self._lost[1], LOST, -1)
        waiting = {p: now - p.heard for p in self.peers if p.rank is not None and not p.left}
        if any(silence > self.companion.timeout for silence in waiting.values()):
            longest = max(waiting.values())
            silent = [p for p, silence in waiting.items() if silence > longest - 3 * self.companion.interval]
            self._decide(f"no word from {_names(silent)} for {longest:.0f} s: {SILENT}", LOST, -1)

    def beat(self) -> None:
        self._tell({})

    def _tell(self, message: Message) -> None:
        for peer in self.peers:
            if peer.rank is not None:
                peer.lines.send(message)

    def delivered(self) -> bool:
        return not self.peers

    def _decide(self, text: str, code: int, culprit: int) -> None:
        if self._decided or self.companion.over:
            return
        self._decided = True
        self._tell({"verdict": text, "code": code, "culprit": culprit})
        self.companion.judge(text, code, culprit)

    def _close(self) -> None:
        """Rank 0 is done, and so is the run: every rank has passed the last barrier."""
        self.companion.over = True
        self._tell({"over": True})
        self.companion.finish()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            peer = Peer(promptly(self._server.accept()[0]), self.companion.now)
            self.peers.append(peer)
            self.companion.listen(peer.lines.source, lambda: self._hear(peer))

    def _hear(self, peer: Peer) -> None:
        messages = peer.lines.receive()
        peer.heard = self.companion.now
        for message in messages:
            if peer.rank is not None:
                self.report(message, peer)
            elif not self._greet(peer, message):
                self._drop(peer)
                return
        if peer.lines.ended:
            self._drop(peer)
            if peer.rank is not None and not peer.left:
                self._decide(f"the connection to {peer.name()} {BROKEN}", LOST, peer.rank)

    def _greet(self, peer: Peer, message: Message) -> bool:
        """Let a companion of this run in; whatever else connects is turned away."""
        rank = message.get("rank")
        known = {0, *(other.rank for other in self.peers)}
        if not hmac.compare_digest(str(message.get("token")).encode(), self.companion.token.encode()):
            return False
        if not isinstance(rank, int) or rank in known or not 0 < rank < self.companion.world_size:
            return False
        peer.rank, peer.pid, peer.host = rank, int(message["pid"]), str(message["host"])
        peer.lines.send({"welcome": True})
        if len(known) == self.companion.world_size:  # this one was the last
            self.companion.pipe.send({"complete": True})
        return True

    def _drop(self, peer: Peer) -> None:
        self.companion.selector.unregister(peer.lines.source)
        self.peers.remove(peer)
        peer.socket.close()

    def _missing(self) -> str:
        never = sorted(set(range(1, self.companion.world_size)) - {p.rank for p in self.peers if p.rank is not None})
        return f" (ranks that are not here: {', '.join(map(str, never[:20]))})" if never else ""


def _listen(port: int) -> socket.socket:
    """On every address of this machine, in both families where it has them."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", port), family=family, backlog=2048, dualstack_ipv6=both)
    server.setblocking(False)
    return server


def _names(peers: Iterable[Peer]) -> str:
    chosen = sorted(peers, key=lambda peer: peer.rank or 0)
    if len(chosen) == 1:
        return chosen[0].name()
    ranks = ", ".join(str(peer.rank) for peer in chosen[:16]) + (", …" if len(chosen) > 16 else "")
    return f"ranks {ranks} (host {', '.join(sorted({peer.host for peer in chosen})[:8])})"
