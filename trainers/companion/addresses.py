"""Where rank 0's companion may be found by the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct


def own_addresses() -> list[str]:
    """Where other machines may find this one, best first."""
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # the network that the user chose
        chosen = os.environ.get(variable, "")
        if not chosen.startswith("^"):  # those are the ones not to be used
            with contextlib.suppress(OSError):
                found.append(_interface_address(chosen.lstrip("=").split(",")[0]))
    master = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, _, _, address in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: the system picks the address to go out from
                own = str(probe.getsockname()[0])
            found.append(own)
            # The rendezvous is on this machine (whose own name may be 127.0.1.1 here): the others know how to find it.
            if own == address[0] or own.startswith("127."):
                found.append(master)
    found.append(socket.gethostname())
    return list(dict.fromkeys(found))


def _interface_address(name: str) -> str:
    """The IPv4 address of a network interface of Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])
