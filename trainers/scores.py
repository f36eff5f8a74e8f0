"""Scores of classifiers: accuracy by class, confusion, and how far a score would move with other test images."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of one prediction an image; percentages."""

    top1: float
    top5: float | None  # None below six classes, where it says nothing
    per_class: list[float | None]  # None for a class without test images
    confusion: Tensor  # [C, C] int64: images of class (row) taken for class (column)
    correct: Tensor  # [N] bool


def accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Of scores [N, C], the larger the likelier, for labels [N]."""
    return ranked_accuracy(scores.topk(min(5, scores.shape[1]), dim=1).indices, labels, scores.shape[1])


def ranked_accuracy(ranking: Tensor, labels: Tensor, classes: int) -> Accuracy:
    """Of the likeliest classes [N, 5] (all, where there are fewer), likeliest first, for labels [N]."""
    labels, ranking = labels.cpu(), ranking.cpu()
    predicted = ranking[:, 0]
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
    totals = confusion.sum(1)
    right = confusion.diagonal()
    return Accuracy(
        top1=100 * (predicted == labels).double().mean().item(),
        top5=100 * (ranking == labels[:, None]).any(1).double().mean().item() if classes >= 6 else None,
        per_class=[100 * int(r) / int(t) if t else None for r, t in zip(right, totals, strict=True)],
        confusion=confusion,
        correct=predicted == labels,
    )


def top_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share in percent of rows of scores [N, C] whose label is among the k largest."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()


def bootstrap_interval(values: Tensor, *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of values [N], from resampled images (Efron & Tibshirani, 1993, section 13.3).

    It says how the score would scatter with other test images of the same kind, not with other training runs.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    at_a_time = max(1, 2**23 // len(values))  # 64 MB of positions
    means = []
    for first in range(0, RESAMPLES, at_a_time):
        count = min(at_a_time, RESAMPLES - first)
        means.append(values[torch.randint(len(values), (count, len(values)), generator=generator)].mean(1))
    low, high = (
        torch.cat(means).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    )
    return low, high


def confusion_picture(confusion: Tensor, classes: tuple[str, ...], title: str) -> bytes:
    """A PNG of a confusion matrix [C, C], each row in shares of its class."""
    from matplotlib.figure import Figure

    count = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, max(4.5, 0.42 * count + 2))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="share of the images of the class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="class", title=title)
    if count <= 30:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                if (share := float(shares[row, column])) >= 0.005:
                    colour = "black" if share > 0.6 else "white"
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    return as_png(figure)


def as_png(figure: object) -> bytes:
    """A matplotlib Figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)  # type: ignore[attr-defined]
    return buffer.getvalue()
