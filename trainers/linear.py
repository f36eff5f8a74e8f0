"""Multinomial logistic regression on frozen features: every L2 strength of a grid at once, by one batched L-BFGS.

All strengths share the features, so the logits of all are one matrix product, and one eigendecomposition of the
features' covariance makes the problems round: in its basis the Hessian of each is bounded by a diagonal matrix
(Böhning, 1992), which L-BFGS starts from. A fit then takes tens of steps instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.lbfgs import minimise

L2_GRID = tuple(10.0 ** (step / 2) for step in range(-12, 3))  # 1e-6 to 10
LOGITS_AT_A_TIME = 2**24  # of all strengths and classes: 64 MB
NOTHING = -60.0  # a logit so far below the largest has a share of 1e-26; smaller ones would be slow, denormal numbers
_ROWS = 4096  # in float64 at a time


@dataclass(frozen=True, slots=True)
class LinearFit:
    """logits = (x − mean)/scale @ weight.T + bias."""

    weight: Tensor  # [C, d]
    bias: Tensor  # [C]
    mean: Tensor  # [d]
    scale: Tensor  # [d]
    l2: float
    converged: bool = True

    def logits(self, features: Tensor) -> Tensor:
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LinearSearch:
    best: LinearFit
    holdout_top1: dict[float, float]  # L2 strength -> percent on the held-out part
    at_edge: bool  # the best strength is the smallest or largest tried


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: Sequence[float], *, standardise: bool = True
) -> list[LinearFit]:
    """Minimise mean cross-entropy + l2/2 · |weight|² (the bias is free) over features [N, d], for each strength.

    scikit-learn's ``C`` is 1/(l2 · N). Features are standardised by their own mean and std unless told otherwise;
    dimensions that never vary are only centred. float32 (float64 for float64 features).

    Raises:
        ValueError: a strength that is not above 0.
    """
    if not l2 or min(l2) <= 0:
        raise ValueError(f"l2={list(l2)}: expected strengths above 0")
    mean, scale = mean_and_scale(features) if standardise else (features.new_zeros(()), features.new_ones(()))
    centre = features.mean(0) if not standardise else mean
    rows, variances, basis = _round((features - centre).div_(scale))
    strengths = features.new_tensor(l2)
    problem = _Problem(rows, labels, classes, strengths)
    # The last column is the bias; ½ bounds the eigenvalues of the softmax's Hessian.
    curvature = 0.5 * torch.cat([variances, variances.new_ones(1)]) + F.pad(
        strengths[:, None].expand(-1, len(variances)), (0, 1)
    )
    found, done = minimise(problem, rows.new_zeros(len(l2), classes, rows.shape[1]), curvature[:, None, :])
    fits = []
    for strength, solution, converged in zip(l2, found, done.tolist(), strict=True):
        weight = solution[:, :-1] @ basis.T
        bias = solution[:, -1]
        if not standardise:
            bias = bias - weight @ centre
        fits.append(LinearFit(weight, bias, mean, scale, strength, converged))
    return fits


def search_logistic(
    features: Tensor,
    labels: Tensor,
    holdout_features: Tensor,
    holdout_labels: Tensor,
    classes: int,
    grid: Sequence[float] = L2_GRID,
    *,
    standardise: bool = True,
) -> LinearSearch:
    """Fit every L2 strength and keep the best on the held-out part. Ties go to the stronger regularisation."""
    scores: dict[float, float] = {}
    fits = fit_logistic(features, labels, classes, sorted(grid, reverse=True), standardise=standardise)
    for fit in fits:
        hits = fit.logits(holdout_features).argmax(1) == holdout_labels
        scores[fit.l2] = 100 * hits.double().mean().item()
    best = max(fits, key=lambda fit: scores[fit.l2])
    return LinearSearch(best, scores, best.l2 in (min(grid), max(grid)) and len(grid) > 1)


class _Problem:
    """The objectives of G strengths and their gradients, by one product over the rows for the logits of all."""

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, strengths: Tensor) -> None:
        """rows [N, r + 1] with a last column of ones, labels [N], strengths [G]."""
        self.rows, self.labels, self.strengths = rows, labels, strengths
        self.at_a_time = max(1, LOGITS_AT_A_TIME // (len(strengths) * classes))

    def __call__(self, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [g, C, r + 1] of the strengths ``which`` [g] -> objectives [g] and gradients [g, C, r + 1]."""
        flat = weights.flatten(0, 1)
        penalised = weights * self.strengths[which, None, None]
        penalised[..., -1] = 0
        losses = (0.5 * penalised * weights).sum((1, 2), dtype=torch.float64)
        gradient = torch.zeros_like(flat)
        count = len(self.rows)
        for rows, labels in zip(self.rows.split(self.at_a_time), self.labels.split(self.at_a_time), strict=True):
            # [g, C, n]: the softmax then runs along n. This order of factors is the quick one on a CPU for small g.
            logits = F.linear(rows, flat).T.contiguous().view(*weights.shape[:2], len(rows))
            own = labels.expand(len(weights), 1, -1)
            picked = logits.gather(1, own)
            largest = logits.amax(1, keepdim=True)
            share = logits.sub_(largest).clamp_min_(NOTHING).exp_()
            total = share.sum(1, keepdim=True)
            losses += (total.log() + largest - picked).sum((1, 2), dtype=torch.float64) / count
            share.div_(total * count).scatter_add_(1, own, share.new_full(own.shape, -1 / count))
            gradient.addmm_(share.flatten(0, 1), rows)
        return losses, gradient.view_as(weights) + penalised


def mean_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """[d] each, of features [N, d]; the scale is the standard deviation, and 1 where hardly anything varies."""
    mean = features.mean(0)
    scale = features.std(0, unbiased=False)
    return mean, torch.where(scale > 1e-6 * scale.max().clamp_min(1e-30), scale, 1.0)


def _round(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred features [N, d] in the basis of their covariance: rows [N, r + 1] with a last column of ones, the
    variances [r] and the basis [d, r]. Directions in which nothing varies are left out: their weights are 0.

    The decomposition is in float64: the spectra of features decay, and what is last in them can tell classes apart.
    """
    count, width = centred.shape
    few = count < width
    moments = centred.new_zeros(min(count, width), min(count, width), dtype=torch.float64)
    for part in centred.split(_ROWS, dim=1) if few else centred.split(_ROWS):
        exact = part.double()
        moments += (exact @ exact.T if few else exact.T @ exact) / count
    variances, vectors = torch.linalg.eigh(moments)
    kept = variances > variances[-1].clamp_min(0) * len(variances) * torch.finfo(torch.float64).eps
    variances, vectors = variances[kept], vectors[:, kept]
    basis = (centred.double().T @ vectors / (variances * count).sqrt() if few else vectors).to(centred.dtype)
    return F.pad(centred @ basis, (0, 1), value=1.0), variances.to(centred.dtype), basis.contiguous()
