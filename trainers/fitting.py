"""Small networks that are fitted beside the encoder, each with an optimizer of its own: all of their state by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fitted_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and buffers by name, the optimizer's state of a parameter as ``name::key``."""
    tensors = dict(module.state_dict())
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}::{key}"] = value
    return tensors


def load_fitted(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``fitted_state``."""
    module.load_state_dict({name: value for name, value in tensors.items() if "::" not in name}, strict=True)
    for name, parameter in module.named_parameters():
        for full, value in tensors.items():
            owner, _, key = full.rpartition("::")
            if owner == name:
                stays = value.dim() == 0 and not optimizer.defaults.get("fused")  # Adam's step count
                device = value.device if stays else parameter.device
                optimizer.state[parameter][key] = value.to(device).clone()
