"""Without a GPU the Triton kernels run under Triton's interpreter, asked for before they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
