"""What a step on a CPU frees is kept for the next one."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainers.engine import EngineConfig

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory(config: EngineConfig, device: torch.device) -> bool:
    """Let this process keep what it frees, if ``engine.keep_memory`` says so of a CPU; returns whether it will.

    glibc gives every array above 32 MB back to the system, and takes the next one anew, page by page, each filled with
    zeros first: a fifth to a third of the time of training on a CPU. Kept, freed blocks are cut for what comes next,
    and what is left of them adds up to about half of what the arrays take.
    """
    if device.type != "cpu" or not config.keep_memory or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1
