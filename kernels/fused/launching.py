"""Where and in how many programs a kernel is launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton


def on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def columns_a_split(rows: int, columns: int, device: torch.device, block: int, granule: int) -> int:
    """How many columns one program visits, where a block of rows alone would leave multiprocessors idle.

    Each shall have about two programs to work on, given blocks of `block` rows. A multiple of `granule`, so that a
    split begins with a tile.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    splits = max(1, 2 * processors // triton.cdiv(rows, block))
    return triton.cdiv(triton.cdiv(columns, splits), granule) * granule
