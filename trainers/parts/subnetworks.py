"""Many small perceptrons side by side: the subnetworks whose scores BeCLR's divergence is made of."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipelines.config import Section

# On a CPU so many hidden activations at a time as stay in a core's cache while they are rectified, dropped and used:
# with all of them at once, a step of 200 subnetworks takes twice as long.
_CPU_TILE = 1 << 20


class SubnetworksConfig(Section):
    count: int = Field(100, ge=2)  # K
    widths: tuple[int, ...] = (512, 1)  # outputs of each layer; the last is the score
    dropout: float = Field(0.2, ge=0, le=0.99)  # of hidden activations, in training
    normalise: bool = True  # projections to length 1 before they are scored; the seed's ImageNet model does not

    @field_validator("widths")
    @classmethod
    def _end_in_a_score(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if not widths or min(widths) < 1 or widths[-1] != 1:
            raise ValueError(f"expected widths of at least 1, of which the last is 1, a score; got {list(widths)}")
        return widths


class Subnetworks(nn.Module):
    """K perceptrons without shared weights, d -> widths, ReLU and dropout between their layers; [N, d] -> [N, K].

    They run as batched products, in the precision of the weights whatever autocast says: a divergence is a difference
    of scores. Initialised as K times ``nn.Linear`` would be.
    """

    def __init__(self, width: int, config: SubnetworksConfig) -> None:
        super().__init__()
        pairs = pairwise((width, *config.widths))
        self.layers = nn.ModuleList(BatchedLinear(config.count, into, out) for into, out in pairs)
        self.dropout, self.normalise = config.dropout, config.normalise

    def forward(self, z: Tensor) -> Tensor:
        """z [N, d] -> scores [N, K], in the dtype of the weights."""
        layers = [(cast(Tensor, layer.weight), cast(Tensor, layer.bias)) for layer in self.layers]
        count, widest = len(layers[0][0]), max(weight.shape[2] for weight, _ in layers)
        at_once = max(1, _CPU_TILE // (len(z) * widest)) if z.device.type == "cpu" else count
        tiles = zip(*(zip(w.split(at_once), b.split(at_once), strict=True) for w, b in layers), strict=True)
        with torch.autocast(z.device.type, enabled=False):
            rows = z.to(layers[0][0].dtype)
            if self.normalise:
                rows = F.normalize(rows, dim=1)
            return torch.cat([self._scores(rows, tile) for tile in tiles]).T.contiguous()

    def _scores(self, rows: Tensor, layers: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        """Scores [k, N] by k of the subnetworks."""
        dropped = round(self.dropout * 2**16) if self.training else 0
        hidden = rows.expand(len(layers[0][0]), *rows.shape)
        for number, (weight, bias) in enumerate(layers):
            if number > 0:
                hidden = _DroppedReLU.apply(hidden, dropped)
                weight = weight / (1 - dropped / 2**16)  # instead of the activations, which are many more
            hidden = torch.baddbmm(bias[:, None], hidden, weight)
        return hidden[..., 0]


class BatchedLinear(nn.Module):
    """The weights [K, in, out] and biases [K, out] of K linear layers."""

    def __init__(self, count: int, features_in: int, features_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(features_in)
        self.weight = nn.Parameter(torch.empty(count, features_in, features_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, features_out).uniform_(-bound, bound))


class _DroppedReLU(torch.autograd.Function):
    """ReLU, then each activation zero with a probability of ``dropped`` / 65,536; in place, without rescaling.

    Nothing but the result is kept for the backward pass: where it is zero, no gradient passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        x.relu_()
        if dropped:
            # Sixteen random bits an activation: eight times as fast as torch's own Bernoulli draws on a CPU.
            words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
            bits = words.view(torch.int16)[: x.numel()].view(x.shape)
            x.mul_((bits >= dropped - 2**15).view(torch.uint8))
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, x, 0), None
