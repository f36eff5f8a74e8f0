"""``python -m tests.limited MEGABYTES RECIPE …``: ``train.py`` whose steps may take so much more memory than its start.

Imports and compiled kernels take gigabytes of addresses, of machine to machine different ones: they come before.
"""

import resource
import sys

import psutil
import torch

import train
from trainers.pretrain import Run

if __name__ == "__main__":
    megabytes, pretrain = int(sys.argv.pop(1)), train.pretrain

    def limited(run: Run) -> int:
        next(iter(run.loader.epoch(0)))
        most = psutil.Process().memory_info().vms + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return pretrain(run)

    train.pretrain = limited
    torch.set_num_threads(1)
    train.app()
