"""Calibration of a linear classifier on frozen features, and what its doubt tells of errors and of foreign images.

Doubt comes from the classifier's softmax; from passes with dropout, if the encoder has any; and from the posterior over
latent classes, if the run is one of probabilistic SimCLR.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipelines.plain_views import plain_batches
from pipelines.sources import DataConfig, DataError, Source, open_source
from trainers.calibration import BINS, fit_temperature
from trainers.dropout import dropout_rate
from trainers.features import BATCH_SIZE
from trainers.linear import LinearFit, search_logistic
from trainers.posterior import entropy_of, posterior
from trainers.protocols import Job, ProtocolSettings, Result
from trainers.uncertainty import DropoutPasses, Head, dropout_passes
from trainers.uncertainty_pictures import Shown, images_picture
from trainers.uncertainty_report import MEASURES, Seen, figures, pictures, table
from trainers.whole import load_method, method_config

SCORED = ("aurc", "ood_auroc", "ood_fpr95")  # of every doubt; more is in the record
SHOWN = 16  # images at each end of the montage


class Settings(ProtocolSettings):
    passes: int = Field(20, ge=2)  # with dropout, where the encoder has any
    calibrate: Literal["none", "temperature"] = "none"
    ood: DataConfig | None = None  # foreign images: the test split of another source; its name alone will do

    @field_validator("ood", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and "source" not in value:
            raise ValueError("which images? name them by ood.source=… beside its other keys")
        return {"source": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class _Projector:
    """Of probabilistic SimCLR: its outputs are posteriors."""

    module: nn.Module
    beta: float

    def __call__(self, features: Tensor) -> Tensor:
        return posterior(self.module(features), self.beta).probabilities


@dataclass(frozen=True, slots=True)
class _Classifier:
    """Linear, on features; probabilities are softmax(logits / temperature)."""

    fit: LinearFit
    temperature: float

    def __call__(self, features: Tensor) -> Tensor:
        return (self.fit.logits(features) / self.temperature).softmax(1)


def score(job: Job[Settings]) -> Result:
    """The value is the expected calibration error of the predictions: those with dropout, if there is any."""
    settings = job.settings
    train, holdout, test = job.splits()
    if holdout is None:
        raise DataError(f"{train.name} has no held-out part to choose the L2 strength on; set data.holdout above 0")
    foreign = None if settings.ood is None else open_source(settings.ood, "test")
    if foreign is not None and foreign.fingerprint() == test.fingerprint():
        raise DataError(f"ood.source={foreign.name} holds the very images that are scored; name another source")
    projector = _projector(job)
    (features, labels), (held, held_labels) = job.features(train), job.features(holdout)
    search = search_logistic(features, labels, held, held_labels, train.num_classes)
    warnings = ["the L2 strength chosen is the smallest or largest tried"] if search.at_edge else []
    heads: dict[str, Head] = {"as fitted": _Classifier(search.best, 1.0)}
    temperature = None
    if settings.calibrate == "temperature":
        temperature, at_end = fit_temperature(search.best.logits(held), held_labels)
        heads["calibrated"] = _Classifier(search.best, temperature)
        if at_end:
            warnings.append(f"the temperature {temperature:g} is an end of the range: the held-out part knows no best")
    if projector is not None:
        heads["posterior"] = projector
    own = _see(job, test, heads)
    outside = None
    if foreign is not None and settings.ood is not None:
        outside = _see(replace(job, data=settings.ood), foreign, heads)  # read as it is stored
    found = figures(own, outside, test.labels)
    main = found.predictor
    return Result(
        metric="ece",
        value=found.predictors[main]["ece"],
        n_test=len(test),
        description=_description(job, train, holdout, test, foreign, own, temperature),
        table=table(found),
        scores={
            **found.predictors[main],
            **{f"{name}_{key}": part[key] for name, part in found.measures.items() for key in part if key in SCORED},
            "temperature": temperature,
        },
        facts={"predictor": main, "ood": None if foreign is None else foreign.name},
        details={
            "l2": search.best.l2,
            "predictors": found.predictors,
            "measures": found.measures,
            **_of_features(own.passes),
        },
        pictures=pictures(own, outside, test.labels, found, None if foreign is None else foreign.name)
        | {"images": _montage(job, test, own, main)},
        warnings=warnings,
    )


def _projector(job: Job[Settings]) -> _Projector | None:
    """If the target is a run whose projections are posteriors."""
    if job.target is None or not job.target.is_dir():
        return None
    config = method_config(job.target)
    if config.name != "probsimclr" or getattr(config, "loss", None) != "simplex":
        return None
    method = load_method(job.target, job.encoder.step).to(job.device)
    return _Projector(cast(nn.Module, method.projector), cast(float, method.beta))


@torch.no_grad()
def _see(job: Job[Settings], source: Source, heads: dict[str, Head]) -> Seen:
    features = job.features(source)[0]
    plain = {name: torch.cat([head(rows) for rows in features.split(4096)]).cpu() for name, head in heads.items()}
    last = "calibrated" if "calibrated" in heads else "as fitted"
    probabilities = {"softmax": plain[last]}
    before = {"softmax": plain["as fitted"]} if last == "calibrated" else {}
    doubts = {"softmax_confidence": 1 - plain[last].amax(1), "softmax_entropy": entropy_of(plain[last])}
    if "posterior" in plain:
        doubts["posterior_confidence"] = 1 - plain["posterior"].amax(1)
        doubts["posterior_entropy"] = entropy_of(plain["posterior"])
    passes = _passes(job, source, heads)
    if passes is not None:
        found = passes.heads[last]
        probabilities["dropout"] = found.probabilities
        if last == "calibrated":
            before["dropout"] = passes.heads["as fitted"].probabilities
        doubts["mc_confidence"] = 1 - found.probabilities.amax(1)
        doubts["predictive_entropy"], doubts["expected_entropy"] = found.entropy, found.expected_entropy
        doubts["mutual_information"], doubts["feature_variance"] = found.mutual_information, passes.variance
        if "posterior" in passes.heads:
            doubts["posterior_mutual_information"] = passes.heads["posterior"].mutual_information
    return Seen(probabilities, before, {name: doubts[name] for name in MEASURES if name in doubts}, passes)


def _passes(job: Job[Settings], source: Source, heads: dict[str, Head]) -> DropoutPasses | None:
    """With dropout, which is part of the encoder and, in probabilistic SimCLR, of the projector."""
    module = job.encoder.module
    if module is None or dropout_rate(module) == 0:
        return None
    module = module.to(job.device).to(memory_format=torch.channels_last).requires_grad_(False)
    also = [head.module for head in heads.values() if isinstance(head, _Projector)]
    return dropout_passes(module, heads, _images(job, source), job.settings.passes, seed=job.settings.seed, also=also)


def _images(job: Job[Settings], source: Source) -> Iterator[Tensor]:
    """In batches [n, 3, H, W], as the encoder was trained to see them, whatever source they are from."""
    encoder = job.encoder
    source = replace(source, mean=encoder.mean, std=encoder.std)
    for images, _ in plain_batches(source, encoder.image_size, BATCH_SIZE, job.device, job.data):
        yield images


def _montage(job: Job[Settings], test: Source, own: Seen, predictor: str) -> bytes:
    """The test images of least and of most doubt."""
    measure = "predictive_entropy" if predictor == "dropout" else "softmax_entropy"
    doubt = own.doubts[measure]
    predicted = own.probabilities[predictor].argmax(1)
    order = doubt.argsort(stable=True)
    count = min(SHOWN, len(order) // 2)
    groups = {}
    for title, positions in (("least in doubt", order[:count]), ("most in doubt", order.flip(0)[:count])):
        chosen = replace(test.select(positions), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        batches = plain_batches(chosen, job.encoder.image_size, BATCH_SIZE, torch.device("cpu"), job.data)
        pixels = torch.cat([images for images, _ in batches])
        groups[title] = [
            Shown(image, test.classes[test.labels[i]], test.classes[predicted[i]], float(doubt[i]))
            for image, i in zip(pixels, positions.tolist(), strict=True)
        ]
    return images_picture(groups, MEASURES[measure][0].partition(": ")[2] + ", nats")


def _of_features(passes: DropoutPasses | None) -> dict[str, list[float]]:
    if passes is None:
        return {}
    return {
        "feature_mean": passes.dimension_mean.tolist(),
        "feature_variance": passes.dimension_variance.tolist(),
    }


def _description(
    job: Job[Settings],
    train: Source,
    holdout: Source,
    test: Source,
    foreign: Source | None,
    own: Seen,
    temperature: float | None,
) -> str:
    parts = [
        f"logistic regression by L-BFGS on frozen, standardised features without dropout; {len(train)} images of"
        f" {train.name}/train; L2 chosen by the accuracy on the held-out part ({len(holdout)} images)"
    ]
    if temperature is not None:
        parts.append(f"temperature {temperature:.3g} fitted on the held-out logits without dropout, used in all passes")
    if own.passes is None:
        parts.append("one pass: there is no dropout in the encoder, so no mutual information")
    else:
        assert job.encoder.module is not None
        rate = dropout_rate(job.encoder.module)
        parts.append(
            f"dropout {rate:g} on in {job.settings.passes} passes (seed {job.settings.seed}), entropies in nats"
        )
    if "posterior_entropy" in own.doubts:
        parts.append("posterior over the latent classes from the run's own projector")
    parts.append(f"ECE of {BINS} bins of equal width; all {len(test)} test images")
    if foreign is None:
        parts.append("no foreign images were given (ood=…), so nothing is said of them")
    else:
        parts.append(
            f"foreign: all {len(foreign)} images of {foreign.name}/test, resized and normalised as the encoder's own;"
            " AUROC and FPR at 95 % TPR with the data's own images as the positive class"
        )
    return "; ".join(parts)
