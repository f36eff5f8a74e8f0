"""Many linear classifiers trained by SGD or Adam on the same batches, as one matrix product (cf. DINOv2's linear
evaluation, arXiv:2304.07193, section B.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from trainers.linear import NOTHING

Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True, slots=True)
class Head:
    """One classifier of the grid."""

    features: str  # which choice of features it reads
    lr: float
    weight_decay: float  # added to the gradient, of weights only


def grid(features: tuple[str, ...], lr: tuple[float, ...], weight_decay: tuple[float, ...]) -> list[Head]:
    return [Head(*settings) for settings in product(features, lr, weight_decay)]


class HeadGrid:
    """H classifiers logits = W x + b, those of one choice of features in one tensor.

    A step costs one product [H·C, d] x [d, B] for the logits and one for the gradient. On a CPU this orientation is
    the quick one, and the softmax runs along the B images.
    """

    def __init__(
        self,
        heads: list[Head],
        widths: dict[str, int],
        classes: int,
        *,
        optimizer: Optimizer,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device,
    ) -> None:
        """``widths``: of each choice of features. Weights begin N(0, 0.01²), the same for all heads of a choice, and
        biases at 0; Adam's betas are (0.9, 0.999)."""
        self.heads, self.classes, self.optimizer, self.momentum = heads, classes, optimizer, momentum
        self.steps = 0
        self.banks: dict[str, _Bank] = {}
        for name in dict.fromkeys(head.features for head in heads):
            places = [place for place, head in enumerate(heads) if head.features == name]
            generator = torch.Generator().manual_seed(seed)
            start = 0.01 * torch.randn(classes, widths[name], generator=generator)
            self.banks[name] = _Bank([heads[place] for place in places], places, start.to(device))

    @torch.no_grad()
    def step(self, features: dict[str, Tensor], labels: Tensor, factor: float = 1.0) -> Tensor:
        """One optimizer step on a batch: features [B, d] by choice, labels [B]; ``factor`` multiplies every learning
        rate. Returns the mean cross-entropy of each head before the step, [H]."""
        self.steps += 1
        losses = torch.zeros(len(self.heads), device=labels.device)
        for name, bank in self.banks.items():
            losses[bank.places] = bank.step(features[name], labels, factor, self)
        return losses

    @torch.no_grad()
    def logits(self, features: dict[str, Tensor]) -> Tensor:
        """features [N, d] by choice -> [H, N, C]."""
        rows = len(next(iter(features.values())))
        found = torch.empty(len(self.heads), rows, self.classes, device=next(iter(features.values())).device)
        for name, bank in self.banks.items():
            logits = torch.addmm(bank.bias.view(-1, 1), bank.weight.flatten(0, 1), features[name].T)
            found[bank.places] = logits.view(len(bank.places), self.classes, rows).transpose(1, 2)
        return found

    def head_logits(self, place: int, features: dict[str, Tensor]) -> Tensor:
        """Of one head: [N, C]."""
        head = self.heads[place]
        bank = self.banks[head.features]
        own = bank.places.tolist().index(place)
        return torch.addmm(bank.bias[own], features[head.features], bank.weight[own].T)


class _Bank:
    """The heads of one choice of features: weight [H, C, d], bias [H, C]."""

    def __init__(self, heads: list[Head], places: list[int], start: Tensor) -> None:
        count, device = len(heads), start.device
        self.places = torch.tensor(places, device=device)
        self.weight = start.expand(count, *start.shape).contiguous()
        self.bias = torch.zeros(count, len(start), device=device)
        self.lr = torch.tensor([head.lr for head in heads], device=device)
        self.weight_decay = torch.tensor([head.weight_decay for head in heads], device=device)
        self.first = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.second = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def step(self, rows: Tensor, labels: Tensor, factor: float, of: HeadGrid) -> Tensor:
        flat = self.weight.flatten(0, 1)
        logits = torch.addmm(self.bias.view(-1, 1), flat, rows.T).view(*self.bias.shape, len(rows))
        own = labels.expand(len(self.bias), 1, -1)
        picked = logits.gather(1, own)
        largest = logits.amax(1, keepdim=True)
        share = logits.sub_(largest).clamp_min_(NOTHING).exp_()
        total = share.sum(1, keepdim=True)
        losses = (total.log() + largest - picked).mean((1, 2))
        share.div_(total * len(rows)).scatter_add_(1, own, share.new_full(own.shape, -1 / len(rows)))
        gradient = (share.flatten(0, 1) @ rows).view_as(self.weight)
        if self.weight_decay.any():
            gradient.addcmul_(self.weight_decay[:, None, None], self.weight)
        self._move(0, self.weight, gradient, factor * self.lr[:, None, None], of)
        self._move(1, self.bias, share.sum(2), factor * self.lr[:, None], of)
        return losses

    def _move(self, number: int, values: Tensor, gradient: Tensor, lr: Tensor, of: HeadGrid) -> None:
        first, second = self.first[number], self.second[number]
        if of.optimizer == "sgd":
            first.mul_(of.momentum).add_(gradient)
            values.addcmul_(first, -lr)
            return
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = second.sqrt().div_(math.sqrt(1 - 0.999**of.steps)).add_(1e-8)
        values.addcdiv_(first * -lr, scale, value=1 / (1 - 0.9**of.steps))
