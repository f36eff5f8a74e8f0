"""What a try does, in place of training: takes a known amount of memory, or ends in another way. Imports no PyTorch."""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

MB_AN_IMAGE = 2


def allocate(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    path.with_suffix(".pid").write_text(str(os.getpid()))
    pipe.send({"device": "CPU", "free": 0})
    held = []
    for _ in range(batch_size // ranks):
        held.append(b"x" * (MB_AN_IMAGE * 10**6))
        time.sleep(0.002)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    pipe.send({"peak": peak, "rate": 1.0})
    time.sleep(100)


def killed(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    raise SystemExit(3)


def no_memory(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    pipe.send({"device": "some GPU", "free": 10**9})
    pipe.send({})
    time.sleep(100)


def on_a_gpu(pipe: Connection, path: Path, overrides: list[str], batch_size: int, ranks: int) -> None:
    """A gigabyte of which 300 MB, and one a share's image, are in use; what the process takes on the host is more."""
    pipe.send({"device": "some GPU", "free": 10**9})
    pipe.send({"peak": (300 + batch_size // ranks) * 10**6, "rate": 1.0})
    time.sleep(100)
