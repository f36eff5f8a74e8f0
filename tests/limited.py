"""``python -m tests.limited MEGABYTES RECIPE …``: ``train.py`` whose steps may take so much more memory than its start.

Imports and compiled kernels take memory too, not the same on every machine: they come before.
"""

import resource
import sys
from contextlib import AbstractContextManager

import psutil
import torch

import train
from trainers.pretrain import Run

if __name__ == "__main__":
    megabytes, known_failures = int(sys.argv.pop(1)), train.known_failures

    def limited(run: Run) -> AbstractContextManager[None]:
        next(iter(run.loader.epoch(0)))
        most = psutil.Process().memory_info().data + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # addresses that are only reserved do not count
        return known_failures(run)

    train.known_failures = limited
    torch.set_num_threads(1)
    train.app()
