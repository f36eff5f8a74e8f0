"""Multinomial logistic regression on frozen features: full-batch L-BFGS over a grid of L2 strengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

L2_GRID = tuple(10.0**exponent for exponent in torch.linspace(-6, 1, 15).tolist())


@dataclass(frozen=True, slots=True)
class LinearFit:
    """logits = (x − mean)/scale @ weight.T + bias."""

    weight: Tensor  # [C, d]
    bias: Tensor  # [C]
    mean: Tensor  # [d]
    scale: Tensor  # [d]
    l2: float

    def logits(self, features: Tensor) -> Tensor:
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LinearSearch:
    best: LinearFit
    holdout_top1: dict[float, float]  # L2 strength -> percent on the held-out part
    at_edge: bool  # the best strength is the smallest or largest tried


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    start: LinearFit | None = None,
    max_iterations: int = 300,
) -> LinearFit:
    """Minimise mean cross-entropy + l2/2 · |weight|² (the bias is free) over standardised features [N, d].

    scikit-learn's ``C`` is 1/(l2 · N). Features are standardised by their own mean and std; dimensions that never
    vary are only centred. ``start``: a fit to begin from.
    """
    if start is None:
        mean = features.mean(0)
        scale = features.std(0, unbiased=False)
        scale = torch.where(scale > 1e-6 * scale.max().clamp_min(1e-30), scale, 1.0)
        weight = features.new_zeros(classes, features.shape[1])
        bias = features.new_zeros(classes)
    else:
        mean, scale, weight, bias = start.mean, start.scale, start.weight.clone(), start.bias.clone()
    inputs = (features - mean) / scale
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearFit(weight.detach(), bias.detach(), mean, scale, l2)


def search_logistic(
    features: Tensor,
    labels: Tensor,
    holdout_features: Tensor,
    holdout_labels: Tensor,
    classes: int,
    grid: tuple[float, ...] = L2_GRID,
) -> LinearSearch:
    """Fit every L2 strength, strongest first and each from the last, and keep the best on the held-out part.

    Ties go to the stronger regularisation.
    """
    scores: dict[float, float] = {}
    best: LinearFit | None = None
    fit: LinearFit | None = None
    for l2 in sorted(grid, reverse=True):
        fit = fit_logistic(features, labels, classes, l2, start=fit)
        hits = fit.logits(holdout_features).argmax(1) == holdout_labels
        scores[l2] = 100 * hits.double().mean().item()
        if best is None or scores[l2] > scores[best.l2]:
            best = fit
    assert best is not None
    return LinearSearch(best, scores, best.l2 in (min(grid), max(grid)) and len(grid) > 1)
