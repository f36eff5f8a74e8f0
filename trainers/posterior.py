"""What a probabilistic encoder says of single images: their posterior over latent classes, and how sure it is.

Two kinds of doubt: the entropy of a posterior is the image's (no class fits, or several do); the mutual information
between the posterior and the weights, from passes with dropout, is the network's (BALD, arXiv:1112.5745).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.simplex_tiled import log_softplus
from trainers.dropout import MCDropout, mc_dropout
from trainers.methods import BaseMethod

BETA = 0.8  # sharpness of the softplus, as in ``kernels.simplex_loss``


@dataclass(frozen=True, slots=True)
class Posterior:
    probabilities: Tensor  # π [N, C], rows sum to 1
    entropy: Tensor  # [N] nats, 0 to log C
    confidence: Tensor  # [N] the highest probability


@dataclass(frozen=True, slots=True)
class Passes:
    """Of several passes with dropout; float32."""

    mean: Tensor  # [N, C] of the outputs
    variance: Tensor  # [N, C] of the outputs over the passes, unbiased
    probabilities: Tensor  # [N, C] the mean posterior
    predictive_entropy: Tensor  # [N] nats, of the mean posterior: both kinds of doubt
    mutual_information: Tensor  # [N] nats, that less the mean entropy of the passes' posteriors: the network's doubt


def posterior(z: Tensor, beta: float = BETA) -> Posterior:
    """π = u / sum u with u = softplus_beta(z), as the simplex loss reads projections z [N, C].

    In float32 (float64 for float64), by logarithms: rows far below zero have a posterior too.
    """
    logarithms = log_softplus(z, beta).log_softmax(1)
    probabilities = logarithms.exp()
    return Posterior(probabilities, entropy_of(probabilities), probabilities.amax(1))


@torch.no_grad()
def posterior_statistics(
    z1: Tensor, z2: Tensor, beta: float = BETA, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Of two views' projections [N, C], over all ranks: the posteriors' mean entropy (nats) and confidence, the
    probability that partners share their class, and the information that a posterior has about its image: the entropy
    of the mean posterior less their mean entropy, 0 if collapsed, at most log C."""
    first, second = posterior(z1, beta), posterior(z2, beta)
    sums = torch.cat(
        [
            (first.probabilities + second.probabilities).sum(0) / 2,
            (first.entropy + second.entropy).sum().view(1) / 2,
            (first.confidence + second.confidence).sum().view(1) / 2,
            (first.probabilities * second.probabilities).sum().view(1),
            torch.full_like(first.entropy[:1], len(z1)),
        ]
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    means = sums[:-1] / sums[-1]
    entropy, confidence, agreement = means[-3:]
    return {
        "posterior_entropy": entropy,
        "posterior_confidence": confidence,
        "posterior_agreement": agreement,
        "posterior_information": entropy_of(means[None, :-3])[0] - entropy,
    }


@torch.no_grad()
def mc_passes(module: nn.Module, images: Tensor, passes: int, *, beta: float | None = None) -> Passes:
    """Statistics of ``passes`` forward passes with dropout on and all else as in evaluation.

    Args:
        module: a method, of whose images the projections z are taken, or an encoder [N, 3, H, W] -> [N, C], whose
            features are read as projections. It comes out as it went in.
        images: [N, 3, H, W], normalised.
        passes: at least 2. Masks come from torch's generator: seed it to get the same again.
        beta: of the posteriors; None: the method's own, 0.8 for an encoder.

    Raises:
        ValueError: too few passes, or a module without dropout, all of whose passes would be alike.
    """
    if passes < 2:
        raise ValueError(f"passes={passes}: a variance takes at least 2")
    if not any(isinstance(child, MCDropout) and child.rate > 0 for child in module.modules()):
        raise ValueError(
            f"{type(module).__name__} has no dropout, so all passes would be alike; pretrain with method.dropout above"
            " 0 (method.name=probsimclr)"
        )
    beta = getattr(module, "beta", BETA) if beta is None else beta
    mean, squares, probabilities, entropy = (torch.zeros((), device=images.device) for _ in range(4))
    with evaluating(module), mc_dropout(module):
        for number in range(1, passes + 1):
            z = module(images[None])["z"][0] if isinstance(module, BaseMethod) else module(images)
            z = z.float()
            before, mean = mean, mean + (z - mean) / number  # Welford's: no difference of large squares
            squares = squares + (z - before) * (z - mean)
            single = posterior(z, beta)
            probabilities = probabilities + single.probabilities / passes
            entropy = entropy + single.entropy / passes
    predictive = entropy_of(probabilities)
    return Passes(mean, squares / (passes - 1), probabilities, predictive, (predictive - entropy).clamp_min(0))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; each part then returns to its own."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def entropy_of(probabilities: Tensor) -> Tensor:
    """Of each row of probabilities [N, C], in nats: [N]."""
    return -torch.xlogy(probabilities, probabilities).sum(1)
