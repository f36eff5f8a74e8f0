"""A classifier on a frozen teacher's features, trained beside the student that learns from it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.ranks import mean_over_ranks
from trainers.parts.classification import labelled_cross_entropy

_MOMENTUM = 0.9


class TeacherHead(nn.Module):
    """Two linear layers, features -> hidden -> classes, ReLU between them, and their own SGD with momentum 0.9.

    Its weights are buffers: the student's optimizer, whatever it is, leaves them alone, and they are the same on every
    rank. The learning rate falls from ``lr`` to 0 as a cosine over ``total_steps`` calls of ``fit``.
    """

    steps: Tensor  # int64: how many there have been

    def __init__(self, features: int, hidden: int, classes: int, *, lr: float, total_steps: int) -> None:
        super().__init__()
        self.lr, self.total_steps = lr, total_steps
        self._names: list[str] = []
        for number, layer in enumerate((nn.Linear(features, hidden), nn.Linear(hidden, classes))):
            for kind, parameter in layer.named_parameters():
                name = f"{kind}{number}"
                self._names.append(name)
                self.register_buffer(name, parameter.detach().clone())
                self.register_buffer(f"{name}_velocity", torch.zeros_like(parameter))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step = 0  # what `steps` holds on the device, known here too

    def forward(self, features: Tensor) -> Tensor:
        """[N, features] -> logits [N, classes]."""
        return self._logits(features, self._weights())

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> None:
        """One step on features [N, features] with labels [N] (-1: unlabelled, ignored) of all ranks together."""
        weights = self._weights()
        leaves = [weight.detach().requires_grad_() for weight in weights]
        with torch.enable_grad():
            loss = labelled_cross_entropy(self._logits(features, leaves), labels, group)
        gradients = torch.autograd.grad(loss, leaves)
        lr = self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self._step / max(1, self.total_steps))))
        for name, weight, gradient in zip(self._names, weights, gradients, strict=True):
            velocity = self.get_buffer(f"{name}_velocity")
            velocity.mul_(_MOMENTUM).add_(mean_over_ranks(gradient, group))
            weight.sub_(velocity, alpha=lr)
        self.steps.add_(1)
        self._step += 1

    def _weights(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in self._names]

    @staticmethod
    def _logits(features: Tensor, weights: list[Tensor]) -> Tensor:
        first, first_bias, second, second_bias = weights
        hidden = F.relu(F.linear(features.to(first.dtype), first, first_bias))
        return F.linear(hidden, second, second_bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._step = int(self.steps)
