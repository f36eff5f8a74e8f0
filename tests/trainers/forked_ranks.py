"""`python forked_ranks.py`: what two ranks say and exit with as one of them goes wrong, as JSON.

The ranks are forked from one process that has imported torch, each pair for one of the scenarios below.
"""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
import torch
import torch.distributed as dist

from trainers.companion.rank import LostPeerError, exit_at_once
from trainers.engine import EngineConfig, Ranks, joined_ranks, set_group_timeout
from trainers.watch import before_end, report_failure


class RefusedError(ValueError):
    pass


def raises(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ZeroDivisionError("of rank 1")
    dist.all_reduce(torch.ones(3))


def refuses(ranks: Ranks) -> None:
    if ranks.rank == 0:
        raise RefusedError("this is\nno recipe")
    dist.barrier(group=ranks.control)


def dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(9)
    dist.all_reduce(torch.ones(3))


def sleeps_through_a_step(ranks: Ranks) -> None:
    """Alive, but never in the collective; nothing freezes."""
    dist.all_reduce(torch.ones(3))
    set_group_timeout(ranks.group, 2)
    if ranks.rank == 1:
        time.sleep(100)
    dist.all_reduce(torch.ones(3))


def is_slow_at_the_start(ranks: Ranks) -> None:
    """Longer than engine.timeout, as a download or a compilation."""
    if ranks.rank == 0:
        time.sleep(5)
    ranks.barrier()


def leaves_together(ranks: Ranks) -> None:
    ranks.barrier()
    exit_error = RuntimeError("as typer.Exit, which click makes a RuntimeError")
    exit_error.exit_code = 2  # type: ignore[attr-defined]
    raise exit_error


def waits(ranks: Ranks) -> None:
    """For a rank that is lost, outside any collective: the watch's thread ends it, and says so first."""
    before_end(lambda cause, code: print(f"before the end: {code} {cause}"))
    if ranks.rank == 1:
        os._exit(9)
    time.sleep(100)


SCENARIOS: dict[str, tuple[dict[str, float], Callable[[Ranks], None]]] = {
    function.__name__: ({}, function)
    for function in (raises, refuses, dies, sleeps_through_a_step, is_slow_at_the_start, leaves_together, waits)
}
SCENARIOS["comes alone"] = ({"start_timeout": 3}, raises)
SCENARIOS["fails before it joins"] = ({}, raises)
SCENARIOS["port in use"] = ({"watch_port": 1}, raises)


def be_a_rank(rank: int, name: str, taken: int) -> int:
    settings, function = SCENARIOS[name]
    if "watch_port" in settings:
        settings = {"watch_port": taken}
    config = EngineConfig.model_validate({"timeout": 4, "start_timeout": 60, **settings})
    if rank == 1 and name == "comes alone":
        return 0
    if rank == 1 and name == "fails before it joins":
        report_failure("the recipe is not here", 2)
        return 2
    try:
        with joined_ranks(config, (RefusedError,)) as ranks:
            function(ranks)
    except LostPeerError as error:
        if not error.printed:
            print(f"error: {error}", file=sys.stderr)
        exit_at_once(error.code)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        return getattr(error, "exit_code", 1)
    return 0


def play(name: str, folder: Path) -> dict[str, object]:
    with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("", 0)) as other:
        port, taken = probe.getsockname()[1], other.getsockname()[1]
        probe.close()
        begin = time.monotonic()
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                target = os.open(folder / f"{name} {rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(target, 1)
                os.dup2(target, 2)
                try:
                    code = be_a_rank(rank, name, taken)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seconds = time.monotonic() - begin
    time.sleep(0.2)  # for a companion's last line
    return {"codes": codes, "said": [(folder / f"{name} {rank}").read_text() for rank in range(2)], "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: play(name, Path(folder)) for name in SCENARIOS}))
