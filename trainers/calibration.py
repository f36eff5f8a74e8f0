"""Whether probabilities mean what they say: calibration error, proper scores, and the temperature that mends them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
_COLDEST, _HOTTEST = 1e-3, 1e3  # temperatures searched


@dataclass(frozen=True, slots=True)
class Reliability:
    """Predictions binned by their confidence; empty bins have confidence and accuracy 0. float64."""

    edges: Tensor  # [B + 1]
    counts: Tensor  # [B]
    confidence: Tensor  # [B] mean
    accuracy: Tensor  # [B] share right

    @property
    def error(self) -> float:
        """The expected calibration error in percent: sum of counts / N · |accuracy − confidence|."""
        gaps = self.counts * (self.accuracy - self.confidence).abs()
        return 100 * float(gaps.sum() / self.counts.sum())


def equal_width(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """Bins ((b − 1)/B, b/B] of confidences [N] in [0, 1] (Guo et al., arXiv:1706.04599, equation 3)."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    place = torch.bucketize(confidence.double(), edges[1:-1])  # a value on an edge belongs below it
    return _binned(confidence, correct, place, edges)


def equal_mass(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """Bins of as equal counts as can be, in the order of confidence (Nixon et al., arXiv:1904.01685).

    Equal confidences are spread over the bins in the order in which they come.
    """
    order, count = confidence.argsort(stable=True), len(confidence)
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=order.device) * bins // count
    starts = [min(-(-b * count // bins), count - 1) for b in range(1, bins)]
    edges = torch.cat([confidence.new_zeros(1), confidence[order[starts]], confidence.new_ones(1)]).double()
    return _binned(confidence, correct, place, edges)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over [N, C], nats; a probability of 0 counts as the smallest positive number."""
    chosen = probabilities.double().gather(1, labels[:, None])
    return -chosen.clamp_min(torch.finfo(probabilities.dtype).tiny).log().mean().item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over the images of the squared error summed over the classes (Brier, 1950): 0 to 2."""
    truth = F.one_hot(labels, probabilities.shape[1])
    return (probabilities.double() - truth).square().sum(1).mean().item()


def fit_temperature(logits: Tensor, labels: Tensor) -> tuple[float, bool]:
    """The T that minimises the negative log-likelihood of softmax(logits / T) (arXiv:1706.04599, section 4.2).

    The likelihood is concave in 1/T, so its derivative is bisected. Also returned: whether T is an end of the range
    searched, 0.001 to 1000, as it is where all images are classified right and no T is best.
    """
    logits = logits.double()
    truth = logits.gather(1, labels[:, None])[:, 0]

    def slope(temperature: float) -> float:
        """Of the loss by 1/T; it rises with 1/T."""
        return float(((logits / temperature).softmax(1) * logits).sum(1).mean() - truth.mean())

    if slope(_COLDEST) <= 0:
        return _COLDEST, True
    if slope(_HOTTEST) >= 0:
        return _HOTTEST, True
    low, high = _COLDEST, _HOTTEST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low * high) ** 0.5, False


def _binned(confidence: Tensor, correct: Tensor, place: Tensor, edges: Tensor) -> Reliability:
    counts, sums, hits = (
        torch.bincount(place, weights=weights, minlength=len(edges) - 1).cpu()
        for weights in (torch.ones_like(confidence).double(), confidence.double(), correct.double())
    )
    divisor = counts.clamp_min(1)
    return Reliability(edges.cpu(), counts, sums / divisor, hits / divisor)
