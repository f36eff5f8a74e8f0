"""Every test process runs on one thread: two threads on a busy core are slower than one by a factor of twenty."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

import tests.interpreter  # noqa: F401  (before a test imports DeepSpeed, which imports Triton)

torch.set_num_threads(1)
