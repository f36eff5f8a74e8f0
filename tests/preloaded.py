"""What every run of ``train.py`` imports and sets up before its first step. Starts no thread."""

import tests.conftest  # noqa: F401, I001  (first: it says how many threads)

import deepspeed.ops.op_builder.all_ops  # noqa: F401
import sklearn.datasets  # noqa: F401
from numba.core.registry import cpu_target

import train  # noqa: F401

cpu_target.typing_context.refresh()  # numba's tables of types take seconds
cpu_target.target_context.refresh()
