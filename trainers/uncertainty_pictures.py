"""The pictures of the protocol uncertainty, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from trainers.calibration import Reliability
from trainers.scores import as_png
from trainers.uncertainty import RiskCoverage

RIGHT, WRONG, FOREIGN = "#3b6fb6", "#d1495b", "#8c8c8c"


def reliability_picture(diagrams: Mapping[str, Reliability]) -> bytes:
    """Accuracy against confidence in each bin, over the counts of the bins; a column for each diagram."""
    figure = Figure(figsize=(4.2 * len(diagrams) + 0.4, 5.7), layout="constrained")
    axes = figure.subplots(2, len(diagrams), sharex=True, squeeze=False, height_ratios=(3, 1))
    for column, (title, bins) in enumerate(diagrams.items()):
        upper, lower = axes[:, column]
        filled = (bins.counts > 0).numpy()
        left, width = bins.edges[:-1].numpy()[filled], bins.edges.diff().numpy()[filled]
        accuracy, confidence = bins.accuracy.numpy()[filled], bins.confidence.numpy()[filled]
        upper.bar(left, accuracy, width, align="edge", color=RIGHT, edgecolor="white", label="share right")
        upper.bar(
            left,
            confidence - accuracy,
            width,
            bottom=accuracy,
            align="edge",
            facecolor="none",
            edgecolor=WRONG,
            hatch="///",
            linewidth=0.8,
            label="gap to the mean confidence",
        )
        upper.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        upper.set(xlim=(0, 1), ylim=(0, 1), title=f"{title}: ECE {bins.error:.2f} %")
        lower.bar(left, bins.counts.numpy()[filled], width, align="edge", color=FOREIGN, edgecolor="white")
        lower.set(xlabel="confidence")
        if bins.counts.max() > 20 * bins.counts[bins.counts > 0].min():
            lower.set_yscale("log")
            lower.set_ylim(bottom=0.5)
    axes[0, 0].set_ylabel("share right")
    axes[1, 0].set_ylabel("images")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return as_png(figure)


def risk_coverage_picture(curves: Mapping[str, RiskCoverage], errors: Mapping[str, float]) -> bytes:
    """Error in percent of the share of images that are least in doubt; ``errors`` are of all images, by predictor.

    Below the dashed line no order of the images can come: it is that in which all errors are last.
    """
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    axes = figure.subplots()
    highest = 0.0
    for label, curve in curves.items():
        risk = 100 * curve.risk.numpy()
        count = len(risk)
        coverage = 100 * np.arange(1, count + 1) / count
        axes.plot(coverage, risk, linewidth=1.4, label=f"{label} (AURC {curve.area:.2f} %)")
        highest = max(highest, float(risk[coverage >= 10].max()))
    coverage = np.linspace(0.1, 100, 500)
    best = min(errors.values())
    ideal = np.clip(100 * (coverage - (100 - best)) / coverage, 0, None)
    axes.plot(coverage, ideal, color="black", linewidth=1, linestyle="--", label="all errors last")
    axes.set(
        xlim=(0, 100),
        ylim=(0, 1.1 * max(highest, best, 0.1)),
        xlabel="images kept, the least in doubt first (%)",
        ylabel="errors among them (%)",
        title="; ".join(f"{name}: {error:.2f} % wrong of all" for name, error in errors.items()),
    )
    figure.legend(loc="outside right upper", fontsize=8)
    return as_png(figure)


def doubts_picture(doubts: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], foreign: str | None) -> bytes:
    """Histograms of each doubt: (of the test images, which of them are right, of the foreign images)."""
    columns = min(3, len(doubts))
    rows = -(-len(doubts) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (label, (own, correct, outside)) in zip(places, doubts.items(), strict=False):
        groups = {"right": (own[correct].double().numpy(), RIGHT), "wrong": (own[~correct].double().numpy(), WRONG)}
        if outside is not None:
            groups[f"{foreign} (foreign)"] = (outside.double().numpy(), FOREIGN)
        every = np.concatenate([values for values, _ in groups.values()])
        edges = np.histogram_bin_edges(every, bins=30)
        for name, (values, colour) in groups.items():
            if len(values):
                share = np.full(len(values), 100 / len(values))
                axes.hist(values, edges, weights=share, histtype="step", color=colour, linewidth=1.5, label=name)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in places[len(doubts) :]:
        axes.axis("off")
    for row in range(rows):
        places[row * columns].set_ylabel("share of the group (%)", fontsize=8)
    places[0].legend(fontsize=8)
    return as_png(figure)


@dataclass(frozen=True, slots=True)
class Shown:
    """An image of the montage."""

    pixels: Tensor  # [3, H, W] in [0, 1]
    label: str
    predicted: str
    doubt: float


def images_picture(groups: Mapping[str, Sequence[Shown]], measure: str) -> bytes:
    """Images in groups, each with its class, what it was taken for where that is another, and its doubt."""
    columns = 8
    heights = [-(-len(group) // columns) for group in groups.values()]
    figure = Figure(figsize=(1.35 * columns, 1.75 * sum(heights) + 0.75 * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False).ravel()
    for part, (title, group), height in zip(parts, groups.items(), heights, strict=True):
        part.suptitle(f"{title} ({measure})", fontsize=11)
        places = part.subplots(height, columns, squeeze=False).ravel()
        for axes in places:
            axes.axis("off")
        for axes, shown in zip(places, group, strict=False):
            wrong = shown.label != shown.predicted
            words = f"{_short(shown.label)} → {_short(shown.predicted)}" if wrong else _short(shown.label)
            axes.imshow(shown.pixels.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_title(f"{words}\n{shown.doubt:.2g}", fontsize=7.5, color=WRONG if wrong else "black")
    return as_png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
