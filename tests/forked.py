"""Processes that begin with everything imported: ``train.py`` starts in a second instead of ten.

A server process imports once and forks for each. What it forks is a process of its own, to be killed like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def start_training(
    arguments: list[Any],
    output: Path,
    environment: dict[str, str] | None = None,
    before: Callable[..., None] | None = None,
    *about: Any,
) -> BaseProcess:
    """``train.py arguments``, what it prints appended to ``output``; ``before(*about)`` runs in it at first."""
    words = [str(argument) for argument in arguments]
    process = CONTEXT.Process(target=_train, args=(words, output, environment or {}, before, about), daemon=True)
    process.start()
    return process


def finished(process: BaseProcess, timeout: float = 200) -> int | None:
    """The exit code; None if the process is still running after all."""
    process.join(timeout)
    return process.exitcode


def wait_until(condition: Callable[[], Any], process: BaseProcess | None = None, timeout: float = 150) -> None:
    """Look again and again; AssertionError once the process has ended or the time is up."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process is None or process.is_alive(), "the process ended before what was waited for"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def _train(
    arguments: list[str],
    output: Path,
    environment: dict[str, str],
    before: Callable[..., None] | None,
    about: tuple[Any, ...],
) -> None:
    from trainers.stopping import StopSignal

    StopSignal.installed()
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if before is not None:
        before(*about)
    import train

    sys.argv = ["train.py", *arguments]
    train.app()
