"""Dropout that can stay on in evaluation: passes of one image then differ by what the network does not know
(MC dropout, Gal & Ghahramani, arXiv:1506.02142)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["train", "always", "off"]


class MCDropout(nn.Module):
    """Dropout of single activations at ``rate``, by ``mode``: in training only, always, or never."""

    def __init__(self, rate: float, mode: Mode = "train") -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate is {rate}, expected at least 0 and below 1")
        self.rate, self.mode = rate, mode

    @property
    def active(self) -> bool:
        return self.mode == "always" or (self.mode == "train" and self.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate) if self.active and self.rate > 0 else x

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, mode={self.mode}"


@contextmanager
def mc_dropout(module: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, every ``MCDropout`` of a module is on, or off, whether it is in training or not."""
    inside = [child for child in module.modules() if isinstance(child, MCDropout)]
    before = [child.mode for child in inside]
    for child in inside:
        child.mode = "always" if active else "off"
    try:
        yield
    finally:
        for child, mode in zip(inside, before, strict=True):
            child.mode = mode


def add_dropout(network: nn.Module, rate: float) -> None:
    """Insert ``MCDropout`` in place: after the stem's ReLU and each stage (layer1, layer2, …) of a ResNet, after each
    ReLU of an ``nn.Sequential``.

    It has no parameters, and what it is put behind keeps its place, so all parameters keep their names: weights load
    with dropout and without.

    Raises:
        ValueError: a network with no place for it, or one that has it already.
    """
    relus = [name for name, child in network.named_children() if isinstance(child, nn.ReLU)]
    stages = [child for name, child in network.named_children() if name.startswith("layer")]
    if not relus or any(isinstance(child, MCDropout) for child in network.modules()):
        raise ValueError(
            f"{type(network).__name__} cannot take dropout: expected a ResNet or an nn.Sequential, with a ReLU of its"
            " own and no dropout yet"
        )
    for name in relus:
        setattr(network, name, nn.Sequential(getattr(network, name), MCDropout(rate)))
    for stage in stages:
        assert isinstance(stage, nn.Sequential)
        stage.append(MCDropout(rate))


def dropout_rate(module: nn.Module) -> float:
    """The rate of the first ``MCDropout`` inside; 0 if there is none."""
    return next((child.rate for child in module.modules() if isinstance(child, MCDropout)), 0.0)
