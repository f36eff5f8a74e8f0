"""Run a function on several gloo ranks and get their results, for what must not depend on their number."""

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # tensors among the arguments are handed over

from tests.forked import CONTEXT


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(group, *args)` in `world_size` one-thread processes joined in one gloo group.

    They are forked from a server that has only imported (`tests.forked`).

    `function` must stand at the top level of a module and, like its arguments and results, be picklable.

    Returns:
        The results in the order of the ranks.

    Raises:
        RuntimeError: a rank failed; the message is the traceback of the one that failed first.
        TimeoutError: some rank was not done after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=_run_rank, args=(rank, world_size, folder, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else a host that cannot look itself up fails
        dist.init_process_group(
            "gloo",
            init_method=Path(folder, "rendezvous").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(dist.group.WORLD, *args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that leaves early breaks the connections of the others
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    while any(rank.is_alive() for rank in ranks):
        _raise_first_failure(ranks, folder)
        if time.monotonic() > deadline:
            late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
            raise TimeoutError(f"ranks {late} of {len(ranks)} were still running when the time was up")
        time.sleep(0.02)
    _raise_first_failure(ranks, folder)


def _raise_first_failure(ranks: list[Any], folder: Path) -> None:
    if not any(rank.exitcode for rank in ranks):
        return
    failures = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    codes = [rank.exitcode for rank in ranks]
    raise RuntimeError(failures[0].read_text() if failures else f"ranks ended with exit codes {codes}")
