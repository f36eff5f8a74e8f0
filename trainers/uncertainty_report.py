"""From predictions and doubts to figures, a table and pictures: what the protocol uncertainty prints."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainers.calibration import brier_score, equal_mass, equal_width, negative_log_likelihood
from trainers.uncertainty import DropoutPasses, RiskCoverage, ood_scores, risk_coverage
from trainers.uncertainty_pictures import doubts_picture, reliability_picture, risk_coverage_picture

# Every doubt: its name in tables, and the predictor whose errors it is to foretell.
MEASURES = {
    "softmax_confidence": ("softmax: 1 − highest probability", "softmax"),
    "softmax_entropy": ("softmax: entropy", "softmax"),
    "mc_confidence": ("dropout: 1 − highest mean probability", "dropout"),
    "predictive_entropy": ("dropout: predictive entropy", "dropout"),
    "expected_entropy": ("dropout: expected entropy", "dropout"),
    "mutual_information": ("dropout: mutual information (BALD)", "dropout"),
    "feature_variance": ("dropout: variance of the features", "dropout"),
    "posterior_confidence": ("posterior: 1 − highest probability", "softmax"),
    "posterior_entropy": ("posterior: entropy", "softmax"),
    "posterior_mutual_information": ("posterior: mutual information (BALD)", "dropout"),
}
COVERAGES = (0.8, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the N images of one source; on the CPU."""

    probabilities: dict[str, Tensor]  # by predictor, softmax or dropout: [N, C]
    before: dict[str, Tensor]  # the same without the temperature, if there is one
    doubts: dict[str, Tensor]  # by measure [N]
    passes: DropoutPasses | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    predictors: dict[str, dict[str, float]]  # calibration; percent, but nll in nats and brier from 0 to 2
    measures: dict[str, dict[str, float]]  # what each doubt is good for, percent
    correct: dict[str, Tensor]  # by predictor [N]
    curves: dict[str, RiskCoverage]  # by measure

    @property
    def predictor(self) -> str:
        """The one whose figures stand for all: with dropout, if there is any."""
        return "dropout" if "dropout" in self.predictors else "softmax"


def figures(own: Seen, outside: Seen | None, labels: Tensor) -> Figures:
    """Of the test images and their labels [N], and of foreign images, if there are any."""
    predictors = {name: _calibration(rows, labels) for name, rows in own.probabilities.items()}
    for name, rows in own.before.items():
        before = _calibration(rows, labels)
        predictors[name] |= {f"{key}_before": before[key] for key in ("nll", "brier", "ece", "ece_equal_mass")}
    correct = {name: rows.argmax(1) == labels for name, rows in own.probabilities.items()}
    curves = {name: risk_coverage(doubt, correct[MEASURES[name][1]]) for name, doubt in own.doubts.items()}
    measures = {}
    for name, curve in curves.items():
        measures[name] = {"aurc": curve.area} | {f"top1_at_{100 * c:g}": curve.accuracy_at(c) for c in COVERAGES}
        if outside is not None:
            auroc, fpr95 = ood_scores(own.doubts[name], outside.doubts[name])
            measures[name] |= {"ood_auroc": auroc, "ood_fpr95": fpr95}
    return Figures(predictors, measures, correct, curves)


def table(found: Figures) -> list[dict[str, str]]:
    """A row for each doubt; the figures of a predictor stand in the first of its rows."""
    rows = []
    for name, figures_of in found.measures.items():
        label, predictor = MEASURES[name]
        calibration = found.predictors[predictor] if name in ("softmax_confidence", "mc_confidence") else {}
        rows.append(_row(label, calibration, figures_of))
    if "dropout" not in found.predictors:
        rows.append(_row("dropout: the encoder has none", {}, {}))
    return rows


def _row(label: str, calibration: dict[str, float], measure: dict[str, float]) -> dict[str, str]:
    shown = calibration | measure
    columns = {"top-1 (%)": "top1", "NLL": "nll", "Brier": "brier", "ECE (%)": "ece", "AURC (%)": "aurc"}
    columns |= {f"top-1 at {100 * c:g} %": f"top1_at_{100 * c:g}" for c in COVERAGES}
    columns |= {"OOD AUROC (%)": "ood_auroc", "OOD FPR95 (%)": "ood_fpr95"}
    cells = {"doubt by": label}
    for column, key in columns.items():
        digits = 3 if key in ("nll", "brier") else 2
        cells[column] = f"{shown[key]:.{digits}f}" if key in shown else "–"
    return cells


def pictures(own: Seen, outside: Seen | None, labels: Tensor, found: Figures, foreign: str | None) -> dict[str, bytes]:
    """PNG files by name."""
    diagrams = {}
    for name, rows in own.probabilities.items():
        if name in own.before:
            diagrams[f"{name}, as fitted"] = equal_width(*_confidence(own.before[name], labels))
        diagrams[f"{name}, with temperature" if name in own.before else name] = equal_width(*_confidence(rows, labels))
    doubts = {
        MEASURES[name][0]: (
            doubt,
            found.correct[MEASURES[name][1]],
            None if outside is None else outside.doubts[name],
        )
        for name, doubt in own.doubts.items()
    }
    return {
        "reliability": reliability_picture(diagrams),
        "risk_coverage": risk_coverage_picture(
            {MEASURES[name][0]: curve for name, curve in found.curves.items()},
            {name: 100 - calibration["top1"] for name, calibration in found.predictors.items()},
        ),
        "doubts": doubts_picture(doubts, foreign),
    }


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    highest, predicted = probabilities.max(1)
    return highest, predicted == labels


def _calibration(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    confidence, correct = _confidence(probabilities, labels)
    return {
        "top1": 100 * correct.double().mean().item(),
        "nll": negative_log_likelihood(probabilities, labels),
        "brier": brier_score(probabilities, labels),
        "ece": equal_width(confidence, correct).error,
        "ece_equal_mass": equal_mass(confidence, correct).error,
    }
