"""SGD with Nesterov's momentum, LARS, and the moving average of weights, by operations that a CUDA graph can hold:
what changes from step to step (learning rate, weight of the average) lies on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.speedrun.recipe import Recipe

_TRUST = 0.001  # LARS's coefficient


class Update:
    """The formulas of torch.optim.SGD (nesterov=True) and of `trainers.optim.LARS`, for a learning rate [] tensor."""

    def __init__(self, network: nn.Module, recipe: Recipe, lr: Tensor) -> None:
        parameters: list[Tensor] = list(network.parameters())
        # Biases and the two vectors of a norm have one dimension, weights more.
        self.weights = [number for number, p in enumerate(parameters) if p.ndim > 1]
        self.others = [number for number, p in enumerate(parameters) if p.ndim <= 1]
        self.parameters, self.recipe, self.lr = parameters, recipe, lr
        self.velocities = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Changes the parameters, given the gradient of each."""
        for numbers, decay in ((self.weights, self.recipe.weight_decay), (self.others, 0.0)):
            parameters = [self.parameters[n] for n in numbers]
            directions = [gradients[n] for n in numbers]
            velocities = [self.velocities[n] for n in numbers]
            if decay:
                directions = list(torch._foreach_add(directions, parameters, alpha=decay))
            if self.recipe.optimizer == "lars":
                self._lars(parameters, directions, velocities, adapt=numbers is self.weights)
            else:
                self._sgd(parameters, directions, velocities)

    def _sgd(self, parameters: list[Tensor], directions: list[Tensor], velocities: list[Tensor]) -> None:
        torch._foreach_mul_(velocities, self.recipe.momentum)
        torch._foreach_add_(velocities, directions)
        ahead = torch._foreach_add(directions, velocities, alpha=self.recipe.momentum)
        torch._foreach_sub_(parameters, torch._foreach_mul(ahead, self.lr))

    def _lars(self, parameters: list[Tensor], directions: list[Tensor], velocities: list[Tensor], adapt: bool) -> None:
        if adapt:
            lengths = torch.stack(list(torch._foreach_norm(parameters)))
            slopes = torch.stack(list(torch._foreach_norm(directions)))
            ratios = torch.where((lengths > 0) & (slopes > 0), _TRUST * lengths / slopes, 1.0)
            directions = list(torch._foreach_mul(directions, list(ratios.unbind())))
        torch._foreach_mul_(velocities, self.recipe.momentum)
        torch._foreach_add_(velocities, torch._foreach_mul(directions, self.lr))
        torch._foreach_sub_(parameters, velocities)


class Average:
    """A copy of a module whose weights and running statistics follow the original's: a <- a + w (x - a)."""

    def __init__(self, module: nn.Module, copy: nn.Module, weight: Tensor) -> None:
        self.weight = weight  # [] on the device
        self.sources, self.targets = _floats(module), _floats(copy)

    @torch.no_grad()
    def __call__(self) -> None:
        steps = torch._foreach_sub(self.sources, self.targets)
        torch._foreach_add_(self.targets, torch._foreach_mul(steps, self.weight))


def average_weight(step: int, steps: int, share: float) -> float:
    """w of step `step`: the mean of all steps so far, later an exponential mean over a share of all `steps`."""
    return 1 / min(step + 1, max(1.0, share * steps))


def _floats(module: nn.Module) -> list[Tensor]:
    state = [*module.parameters(), *module.buffers()]
    return [tensor.detach() for tensor in state if tensor.is_floating_point()]
