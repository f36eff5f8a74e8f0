"""Average precision by brute force in fractions and by scikit-learn, and the classifiers by their optimality."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor

from trainers.multilabel import (
    LinearScores,
    average_precision,
    choose_strengths,
    fit_logistic_heads,
    fit_svms,
    folds,
)


def by_hand(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """(11-point, area), every threshold by counting."""
    pairs = [(s, t) for s, t in zip(scores.tolist(), targets.tolist(), strict=True) if t != -1]
    positives = sum(t for _, t in pairs)
    curve = []
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        chosen = [t for s, t in pairs if s >= threshold]
        curve.append((Fraction(int(sum(chosen)), int(positives)), Fraction(int(sum(chosen)), len(chosen))))

    def best(recall: Fraction) -> Fraction:
        return max(p for r, p in curve if r >= recall)

    eleven = sum(best(Fraction(tenth, 10)) for tenth in range(11)) / 11
    recalls = sorted({r for r, _ in curve} | {Fraction(0)})
    area = sum((high - low) * best(high) for low, high in pairwise(recalls))
    return float(eleven), float(area)


@pytest.mark.parametrize("distinct", [3, 20, 10**6])
def test_average_precision_by_counting_in_fractions(distinct: int) -> None:
    generator = torch.Generator().manual_seed(distinct)
    scores = torch.randint(distinct, (83, 6), generator=generator).double() / 7
    targets = torch.randint(-1, 2, (83, 6), generator=generator).float()
    targets[:, 5] = -1.0
    targets[[3, 8, 20, 21, 40, 50, 51, 70, 80, 81], 5] = 1.0  # ten positives: recalls on the eleven points
    targets[10:20, 5] = 0.0
    eleven, area = average_precision(scores, targets)
    expected = [by_hand(scores[:, c], targets[:, c]) for c in range(6)]
    np.testing.assert_allclose(eleven, [e for e, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(area, [a for _, a in expected], rtol=1e-12)


def test_average_precision_next_to_scikit_learn() -> None:
    """Scikit-learn's is the area without the envelope: no larger, and the same where precision falls throughout."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        labels = rng.integers(0, 2, 60)
        labels[0] = 1
        scores = rng.normal(size=60).round(1 if trial % 2 else 6)
        _, area = average_precision(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None])
        assert area.item() >= average_precision_score(labels, scores) - 1e-12
        precision, recall, _ = precision_recall_curve(labels, scores)  # recall falls
        envelope = np.maximum.accumulate(precision[:-1])
        assert area.item() == pytest.approx(float(-np.diff(recall) @ envelope), abs=1e-12)
    falling = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0])
    scores = torch.arange(13, 0, -1)
    expected = average_precision_score(falling.numpy(), scores.numpy())
    assert average_precision(scores[:, None], falling[:, None])[1].item() == pytest.approx(expected, abs=1e-12)


def test_average_precision_of_a_worked_example() -> None:
    """Hits at ranks 1, 3 and 6: precisions 1, 2/3, 1/2 at recalls 1/3, 2/3, 1."""
    scores = torch.tensor([[6.0], [5], [4], [3], [2], [1]])
    targets = torch.tensor([[1.0], [0], [1], [0], [0], [1]])
    eleven, area = average_precision(scores, targets)
    assert area.item() == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert eleven.item() == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)  # 0-0.3, 0.4-0.6, 0.7-1


def test_average_precision_of_odd_cases() -> None:
    scores = torch.zeros(8, 4)
    targets = torch.tensor([[1.0, 0, -1, 1]] * 2 + [[0.0, 0, -1, -1]] * 6)
    eleven, area = average_precision(scores, targets)
    assert area[0] == eleven[0] == 0.25, "all alike: the share of positives, whatever the order"
    assert eleven.isnan().tolist() == area.isnan().tolist() == [False, True, True, False]
    assert area[3] == 1.0, "what is ignored is no negative"


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Inputs [150, 12], targets [150, 4] of noisy linear rules, some ignored; the last class is never there."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(150, 12, generator=generator, dtype=torch.float64)
    rules = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    noise = 2 * torch.randn(150, 4, generator=generator, dtype=torch.float64)
    targets = (inputs @ rules + noise > 1).float()
    targets[:, 3] = 0
    targets[torch.rand(150, 4, generator=generator) < 0.1] = -1
    return inputs, targets


def test_svms_are_at_the_minimum_of_their_objective(data: tuple[Tensor, Tensor]) -> None:
    inputs, targets = data
    costs = torch.tensor([0.01, 1.0, 30.0, 1.0])
    fitted = fit_svms(inputs, targets, costs)
    assert fitted.converged
    assert not fitted.weight[3].any()
    for c in range(3):
        known = targets[:, c] >= 0
        labels = 2 * targets[known, c].double() - 1
        parameters = torch.cat([fitted.weight[c], fitted.bias[c, None]]).requires_grad_()
        margins = labels * (inputs[known] @ parameters[:-1] + parameters[-1])
        loss = torch.where(labels > 0, 2.0, 1.0) * (1 - margins).clamp_min(0).square()
        objective = 0.5 * parameters.square().sum() + costs[c] * loss.sum()
        (gradient,) = torch.autograd.grad(objective, parameters)
        at_zero = 2 * costs[c] * torch.where(labels > 0, 2.0, 1.0) * labels
        start = torch.cat([inputs[known].T @ at_zero, at_zero.sum()[None]]).norm()
        assert gradient.norm() < 1e-3 * start
        np.testing.assert_allclose(fitted(inputs)[:, c], (inputs @ fitted.weight[c] + fitted.bias[c]), rtol=1e-9)


def test_logistic_heads_against_scikit_learn(data: tuple[Tensor, Tensor]) -> None:
    inputs, targets = data
    l2 = torch.tensor([1e-3, 0.1, 1.0])
    fitted = fit_logistic_heads(inputs, targets[:, :3], l2)
    for c in range(3):
        known = (targets[:, c] >= 0).numpy()
        theirs = LogisticRegression(C=1 / (l2[c].item() * known.sum()), tol=1e-10, max_iter=10_000)
        theirs.fit(inputs.numpy()[known], targets[:, c].numpy()[known])
        np.testing.assert_allclose(fitted.weight[c], theirs.coef_[0], atol=1e-4)
        np.testing.assert_allclose(fitted.bias[c], theirs.intercept_[0], atol=1e-4)


def test_folds_share_out_each_class_evenly(data: tuple[Tensor, Tensor]) -> None:
    targets = data[1]
    masks = folds(targets, 3, seed=0)
    assert torch.equal(torch.stack(masks).long().sum(0), (targets >= 0).long()), "all that is known, each once"
    for value in (0, 1):
        counts = torch.stack([((targets == value) & mask).sum(0) for mask in masks])
        assert (counts.amax(0) - counts.amin(0)).max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(masks, folds(targets, 3, seed=0), strict=True))
    assert not torch.equal(masks[0], folds(targets, 3, seed=1)[0])


def test_strengths_are_chosen_by_what_the_fit_has_not_seen(data: tuple[Tensor, Tensor]) -> None:
    inputs, targets = data
    masks = folds(targets, 3, seed=0)
    seen = []

    def fit(inputs: Tensor, shown: Tensor, strengths: Tensor) -> LinearScores:
        """Class 0 is best at strength 2; class 1 is the same at all; class 2 is best at the last."""
        seen.append((shown.clone(), strengths))
        good = fit_svms(inputs, shown, torch.ones(4))
        sign = torch.ones(4, 1, dtype=torch.float64)
        sign[0] = 1 if strengths[0] == 2 else -1
        sign[2] = 1 if strengths[2] == 3 else -1
        return LinearScores(good.weight * sign, good.bias)

    strengths, scores = choose_strengths(fit, inputs, targets, masks, (1.0, 2.0, 3.0))
    assert strengths.tolist() == [2, 1, 3, 2], "ties take the first; what cannot be scored, the middle"
    assert scores[:, 3].isnan().all()
    assert len(seen) == 9
    for number, (shown, _) in enumerate(seen):
        mask = masks[number % 3]
        assert (shown[mask] == -1).all()
        assert torch.equal(shown[~mask], targets[~mask])
