"""In the place of torchrun and train.py, where a test is about the process that watches them.

``python launcher_stand_in.py RUN MODE`` starts two ranks as torchrun does, ends with 1 whatever they end with, and at a
signal of its own abandons them. ``python -u launcher_stand_in.py RUN MODE RANK`` is a rank.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainers.status import begin_status, end_status, record_checkpoint

CODES = {"preempted": 75, "lost": 69, "failed": 1, "refused": 2}


def launch(run: str, mode: str) -> int:
    if mode == "no ranks":  # at the rendezvous, where other nodes are waited for
        Path(run, "ready-0").touch()
        time.sleep(100)
    command = [sys.executable, "-u", __file__, run, mode]
    ranks = [subprocess.Popen([*command, str(rank)], start_new_session=True) for rank in range(2)]

    def abandon(*_: object) -> None:
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGTERM)
        sys.exit(1)

    signal.signal(signal.SIGTERM, abandon)
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        rank.wait()
    return int(any(rank.returncode for rank in ranks))


def train(run: Path, mode: str, rank: int) -> int:
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    helper = subprocess.Popen(["sleep", "100"])  # of the rank's own process group, as a DataLoader's worker is
    if rank == 0 and mode != "early":
        begin_status(run)
    (run / f"ready-{rank}").touch()
    try:
        while mode in ("trains", "stubborn") and (mode == "stubborn" or not told):
            time.sleep(0.02)
        if mode == "trains":
            time.sleep(0.5)  # the checkpoint takes a while
            (run / f"told-{rank}").write_text(f"{len(told)} {helper.poll()}")
            if rank == 0:
                record_checkpoint(run, 7, 1, "step-00000007")
                end_status(run, 75)
            return 75
    finally:
        helper.kill()
    if mode == "killed" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0 and mode == "lost":
        record_checkpoint(run, int(time.time()), 1, f"step-{time.time_ns()}")
    if rank == 0 and mode != "early":
        end_status(run, CODES.get(mode, 0), None if mode == "done" else f"because of {mode}")
    return CODES.get(mode, int(mode in ("early", "killed")))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(launch(*arguments) if len(arguments) == 2 else train(Path(arguments[0]), arguments[1], int(arguments[2])))
