"""Several machines by ssh: DeepSpeed's host file, and a command for each host."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tools.launching.job import Job, LaunchError, agent_command

# A name, an address, or user@name; never an option, never a word that a shell would see more in.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*")


def read_hostfile(path: Path, nodes: int | None = None, processes: int | None = None) -> tuple[list[str], int | None]:
    """The first ``nodes`` hosts of the file, and the processes that each has room for (None: it does not say).

    A line is DeepSpeed's ``host slots=8``, or a host alone; ``#`` begins a comment.

    Raises:
        LaunchError: the file cannot be read, has a line of another form, a host twice, too few hosts, or hosts with
            other numbers of slots than ``processes`` or than each other.
    """
    hosts: dict[str, int | None] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9][0-9]{0,4})", words[1]) if len(words) == 2 else None
        if not _HOST.fullmatch(words[0]) or len(words) > 2 or (len(words) == 2 and slots is None):
            raise LaunchError(f"{path}, line {number}: {line.strip()!r} is not 'host' or 'host slots=8'")
        if words[0] in hosts:
            raise LaunchError(f"{path}, line {number}: {words[0]} is there twice")
        hosts[words[0]] = int(slots[1]) if slots else None
    if not hosts:
        raise LaunchError(f"--hostfile {path} names no host")
    if nodes is not None and nodes > len(hosts):
        raise LaunchError(f"--nodes {nodes}, but {path} names only {len(hosts)}: {', '.join(hosts)}")
    chosen = list(hosts)[:nodes]
    for host in chosen:
        room = hosts[host]
        if processes is not None and room is not None and room < processes:
            raise LaunchError(f"{processes} processes a node, but {path} gives {host} slots={room}")
    rooms = {hosts[host] for host in chosen}
    if processes is None and len(rooms) > 1:
        raise LaunchError(f"{path} gives its hosts different slots; every node has as many: say --gpus or --processes")
    return chosen, rooms.pop() if len(rooms) == 1 else None


def host_names(hosts: list[str]) -> list[str]:
    """Without the user."""
    return [host.rpartition("@")[2] for host in hosts]


def deepspeed_hostfile(hosts: list[str], processes: int) -> str:
    return "".join(f"{host} slots={processes}\n" for host in hosts)


def remote_commands(job: Job, hosts: list[str], master_addr: str, folder: Path, carried: dict[str, str]) -> list[str]:
    """What each host's shell is to run: the agent in ``folder``, with these variables.

    The agent stops, with a checkpoint, when its standard input ends: that is how it learns of a signal here, and that
    this process or the connection is gone.
    """
    assigned = [f"{name}={value}" for name, value in carried.items()]
    return [
        f"cd {shlex.quote(str(folder))} && exec "
        + shlex.join(["env", *assigned, *agent_command(job, str(rank), master_addr, "--stop-at-end-of-input")])
        for rank in range(len(hosts))
    ]


def ssh_command(host: str, remote: str, port: int | None = None) -> list[str]:
    """No question is asked that nobody would answer, and a dead connection is noticed within a minute."""
    options = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
    return ["ssh", *options, *(["-p", str(port)] if port else []), host, remote]
