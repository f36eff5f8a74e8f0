"""Images with several labels each: average precision, and one-vs-rest linear classifiers on frozen features.

Targets are [N, C]: 1 present, 0 absent, -1 ignored. What is ignored for a class takes no part in its training and none
in its score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from sklearn.svm import LinearSVC
from torch import Tensor

POSITIVE_WEIGHT = 2.0  # of a positive image against a negative one in the SVM's loss (arXiv:1905.01235)
SVM_ITERATIONS = 2000


def average_precision(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision of every class in [0, 1], by VOC's two definitions: eleven points, and the whole area.

    Eleven points (VOC 2007): the mean over the recalls 0, 0.1, …, 1 of the best precision at that recall or above.
    Area (from VOC 2010 on): under precision made monotone, each the best at its recall or above. Images of equal score
    make one threshold, so their order does not matter.

    Args:
        scores: [N, C], the larger the likelier.
        targets: [N, C], 1, 0 or -1.

    Returns:
        float64 [C] twice; NaN for a class without a positive image.
    """
    pairs = [_average_precision(*column) for column in zip(scores.double().T, targets.T, strict=True)]
    eleven, area = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    return eleven, area


def _average_precision(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    known = targets >= 0
    scores, order = scores[known].sort(descending=True)
    hits = (targets[known][order] > 0).long().cumsum(0)
    if not len(hits) or not hits[-1]:
        return math.nan, math.nan
    ends = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of each run of equal scores
    seen = torch.arange(1, len(hits) + 1, device=hits.device)[ends]
    hits = hits[ends]
    best = (hits.double() / seen).flip(0).cummax(0).values.flip(0)
    positives = int(hits[-1])
    area = (hits.diff(prepend=hits.new_zeros(1)) * best).sum().item() / positives
    reached = [int((10 * hits < tenth * positives).sum()) for tenth in range(11)]  # in whole numbers: 0.3 is not 3/10
    return best[reached].mean().item(), area


@dataclass(frozen=True, slots=True)
class LinearScores:
    """scores = inputs @ weight.T + bias."""

    weight: Tensor  # [C, d]
    bias: Tensor  # [C]
    converged: bool = True

    def __call__(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


Fit = Callable[[Tensor, Tensor, Tensor], LinearScores]  # inputs [N, d], targets [N, C], strengths [C]


def fit_svms(inputs: Tensor, targets: Tensor, costs: Tensor) -> LinearScores:
    """Linear SVMs, one a class: L2 penalty, squared hinge, scikit-learn's ``C`` in ``costs`` [C].

    The bias is penalised like a weight (liblinear). A class without positive or without negative images gets zeros.
    """
    rows, known = inputs.double().cpu().numpy(), targets.cpu().numpy()

    def one(column: np.ndarray, cost: float) -> tuple[np.ndarray, float, bool]:
        used = column >= 0
        labels = np.where(column[used] > 0, 1, -1)
        if not used.any() or labels.min() == labels.max():
            return np.zeros(rows.shape[1]), 0.0, True
        svm = LinearSVC(C=cost, class_weight={1: POSITIVE_WEIGHT, -1: 1}, dual=False, max_iter=SVM_ITERATIONS)
        svm.fit(rows[used], labels)
        return svm.coef_[0], float(svm.intercept_[0]), bool(svm.n_iter_ < SVM_ITERATIONS)

    # liblinear releases the interpreter, and threads share the features.
    workers = Parallel(n_jobs=-1, prefer="threads")
    found = workers(delayed(one)(column, cost) for column, cost in zip(known.T, costs.tolist(), strict=True))
    weight = torch.from_numpy(np.stack([weights for weights, _, _ in found]))
    bias = torch.tensor([bias for _, bias, _ in found], dtype=torch.float64)
    return LinearScores(weight.to(inputs), bias.to(inputs), all(converged for _, _, converged in found))


def fit_logistic_heads(inputs: Tensor, targets: Tensor, l2: Tensor, max_iterations: int = 300) -> LinearScores:
    """Logistic regressions, one a class, in one L-BFGS over all of them.

    For each class the mean binary cross-entropy over its known images + l2/2 · |weight|² (the bias is free);
    scikit-learn's ``C`` is 1/(l2 · number of known images).
    """
    known = (targets >= 0).to(inputs.dtype)
    share = known / known.sum(0).clamp_min(1)
    wanted = targets.clamp_min(0).to(inputs.dtype)
    weight = inputs.new_zeros(targets.shape[1], inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    strength = l2.to(inputs)[:, None]

    def objective() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(F.linear(inputs, weight, bias), wanted, reduction="none")
        loss = (losses * share).sum() + 0.5 * (strength * weight.square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    objective()
    slope = max(float(part.grad.abs().max()) for part in (weight, bias) if part.grad is not None)
    return LinearScores(weight.detach(), bias.detach(), converged=slope < 1e-3)


def folds(targets: Tensor, count: int, seed: int) -> list[Tensor]:
    """Cross-validation with the classes in the same proportions in every fold: ``count`` masks [N, C], True where an
    image is held out for a class. Each class divides the images by itself."""
    generator = torch.Generator().manual_seed(seed)
    labels = targets.cpu()
    fold = torch.full(labels.shape, -1)
    for column in range(labels.shape[1]):
        shuffled = torch.randperm(len(labels), generator=generator)
        for value in (1, 0):
            rows = shuffled[labels[shuffled, column] == value]
            fold[rows, column] = torch.arange(len(rows)) % count
    return [(fold == number).to(targets.device) for number in range(count)]


def choose_strengths(
    fit: Fit, inputs: Tensor, targets: Tensor, held_out: list[Tensor], grid: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """For every class the value of ``grid`` with the best average precision (area) on what is held out.

    Args:
        fit: how classifiers are made of inputs, targets and a strength a class.
        inputs: [N, d].
        targets: [N, C].
        held_out: masks [N, C] of the images that a class is fitted without and scored on, one fit each.
        grid: what to try, the most strongly regularised first: it wins ties.

    Returns:
        strengths [C] and the average precisions [len(grid), C], means over the masks; NaN where nothing could be
        scored, and such a class gets the middle of the grid.
    """
    found = []
    for value in grid:
        strengths = torch.full((targets.shape[1],), value, dtype=torch.float64)
        by_mask = []
        for mask in held_out:
            classifier = fit(inputs, targets.masked_fill(mask, -1), strengths)
            by_mask.append(average_precision(classifier(inputs), targets.masked_fill(~mask, -1))[1])
        found.append(torch.stack(by_mask).nanmean(0))
    scores = torch.stack(found)
    best = scores.nan_to_num(-1).argmax(0)  # the first of equals
    best[scores.isnan().all(0)] = len(grid) // 2
    return torch.tensor(grid, dtype=torch.float64)[best], scores
