"""Two hosts on this machine: network namespaces joined by a cable that can be cut."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CABLE = "cable"  # the interface's name on both hosts
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@dataclass(frozen=True)
class Hosts:
    names: tuple[str, str]

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command that runs `command` on that host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", CABLE, "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", CABLE, "up")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    names = (f"twinstream-{os.getpid()}-a", f"twinstream-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", CABLE, "up")
        yield Hosts(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@functools.cache
def why_not() -> str:
    """Why this machine cannot have two hosts, or nothing."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2's ip"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_hosts():
            return ""
    except RuntimeError as error:
        return f"no network namespaces here: {error}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
