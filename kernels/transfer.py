"""From the host to the device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on `device`; itself where it is there already.

    Copied from pinned memory: of what is not pinned, CUDA may wait for all earlier work before it copies, whatever
    ``non_blocking`` says.
    """
    if tensor.device.type != "cpu" or torch.device(device).type == "cpu":
        return tensor.to(device)
    # An expanded tensor, whose elements share memory, cannot be pinned as it is.
    pinned = tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()
    return pinned.to(device, non_blocking=True)
