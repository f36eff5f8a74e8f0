"""Linear classification of frozen features: L-BFGS over a grid of L2 strengths, a grid of SGD heads, or a preset."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.sources import DataError, Source
from trainers.encoders import feature_width
from trainers.features import FrozenEncoder
from trainers.head_grid import HeadGrid, grid
from trainers.head_training import AugmentedRows, Choices, FeatureChoice, cached_batches, train_heads, with_stages
from trainers.linear import L2_GRID, fit_logistic, search_logistic
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import accuracy, top_accuracy
from trainers.state import CheckpointError, damage_named
from trainers.weights import load_tensors

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

_TEN = tuple(10.0 ** (step / 2) for step in range(-5, 5))  # 0.003 to 100

# What each preset stands for. `grid` is ours; the others are what the published systems ran, by their methods' names.
PRESETS: dict[str, dict[str, Any]] = {
    "lbfgs": {"solver": "lbfgs", "l2": L2_GRID, "standardise": True, "augment": False},
    "probsimclr": {"solver": "lbfgs", "l2": (2e-3,), "standardise": False, "augment": False},
    "grid": {"solver": "sgd", "lr": _TEN, "weight_decay": (0.0, 1e-5), "features": ("pooled", "standardised"),
             "epochs": 20, "batch_size": 256, "schedule": "cosine", "augment": True},
    "nnclr": {"solver": "sgd", "lr": (0.1,), "epochs": 90, "batch_size": 128, "schedule": "cosine", "augment": True},
    "beclr": {"solver": "adam", "lr": (1e-3,), "weight_decay": (1e-6,), "epochs": 100, "batch_size": 512,
              "schedule": "constant", "augment": True},
    "simclr": {"solver": "adam", "lr": (3e-4,), "epochs": 500, "batch_size": 256, "schedule": "constant",
               "augment": False},
    "mvmr": {"solver": "adam", "lr": (1e-3,), "epochs": 100, "batch_size": 256, "schedule": "cosine", "augment": True,
             "ten_crop": True},
}  # fmt: skip
_OF_LBFGS = ("l2", "standardise")
_OF_HEADS = ("lr", "weight_decay", "features", "epochs", "batch_size", "schedule", "augment", "augmented_epochs")
COMMON = {"weight_decay": (0.0,), "features": ("pooled",), "ten_crop": False}


class Settings(ClassificationSettings):
    """What is left at None is as the preset says."""

    preset: Literal["lbfgs", "grid", "simclr", "nnclr", "beclr", "probsimclr", "mvmr"] = "lbfgs"
    head: Literal["fitted", "online"] = "fitted"  # online: the probe that was trained beside the encoder
    solver: Literal["lbfgs", "sgd", "adam"] | None = None
    ten_crop: bool | None = None  # test logits averaged over five crops and their mirror images
    l2: tuple[Positive, ...] | None = Field(None, min_length=1)  # lbfgs: l2/2 |W|², beside the mean cross-entropy
    standardise: bool | None = None  # lbfgs
    # sgd (momentum 0.9) and adam: a head for each combination of the three.
    lr: tuple[Positive, ...] | None = Field(None, min_length=1)
    weight_decay: tuple[NotNegative, ...] | None = Field(None, min_length=1)
    features: tuple[FeatureChoice, ...] | None = Field(None, min_length=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    schedule: Literal["cosine", "constant"] | None = None
    augment: bool | None = None  # random resized crop and flip; else the image as it is tested
    augmented_epochs: int | None = Field(None, ge=1)  # of new draws, then used again from memory; None: all epochs

    @model_validator(mode="after")
    def _of_one_solver(self) -> Settings:
        if self.head == "online":
            others = self.model_fields_set - {"head", "ten_crop", "data", "device", "labels"}
            if others:
                raise ValueError(f"{min(others)} is not used with head=online; remove it")
        preset, solver = PRESETS[self.preset]["solver"], self.solver
        if solver is not None and (solver == "lbfgs") != (preset == "lbfgs"):
            other = "lbfgs" if solver == "lbfgs" else "grid"
            raise ValueError(f"solver={solver} does not go with preset={self.preset}; choose preset={other}")
        useless = _OF_HEADS if (solver or preset) == "lbfgs" else _OF_LBFGS
        if given := [name for name in useless if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]} is not used with solver={solver or preset}; remove it")
        return self

    def settled(self) -> Settings:
        """Without None, but for what the solver does not use."""
        preset = COMMON | PRESETS[self.preset]
        return self.model_copy(update={key: value for key, value in preset.items() if getattr(self, key) is None})


def score(job: Job[Settings]) -> Result:
    """The settings that several values are given for are chosen by the held-out part."""
    if job.settings.head == "online":
        return _online(job)
    settings = job.settings.settled()
    if settings.solver == "lbfgs":
        return _by_lbfgs(job, settings)
    return _by_heads(job, settings)


def _by_lbfgs(job: Job[Settings], settings: Settings) -> Result:
    train, holdout, test = job.splits()
    strengths = settings.l2 or ()
    held = _held_out(job, train, holdout, len(strengths))
    subsets = labelled(job, train)
    features, labels = job.features(train)
    test_rows = _test_rows(job, job.encoder, test, settings)
    runs, at_edge, converged = [], False, True
    for chosen in subsets:
        part = (features, labels) if len(chosen) == len(train) else (features[chosen], labels[chosen])
        if held is None:
            (fit,) = fit_logistic(*part, train.num_classes, strengths, standardise=bool(settings.standardise))
            more: dict[str, Any] = {}
        else:
            search = search_logistic(*part, *held, train.num_classes, strengths, standardise=bool(settings.standardise))
            fit, at_edge = search.best, at_edge or search.at_edge
            more = {"holdout_top1": search.holdout_top1[fit.l2], "l2_at_edge_of_grid": search.at_edge}
        converged &= fit.converged
        logits = torch.stack([fit.logits(rows) for rows in test_rows]).mean(0)
        runs.append(Run(len(chosen), {"L2": fit.l2}, accuracy(logits, test.labels.to(job.device)), more))
    kind = "standardised features" if settings.standardise else "features"
    description = (
        f"logistic regression by full-batch L-BFGS on frozen {kind}, without augmentation; {runs[0].labels} labelled"
        f" images of {train.name}/train; L2 {_chosen_by(holdout, len(strengths))}; {_tested(test, test_rows)}"
    )
    result = classification_result(job, runs, test, description)
    if at_edge:
        result.warnings.append("the L2 strength chosen is the smallest or largest tried")
    if not converged:
        result.warnings.append("L-BFGS stopped before the optimum of the L2 strength chosen")
    return result


def _by_heads(job: Job[Settings], settings: Settings) -> Result:
    train, holdout, test = job.splits()
    names, rates, decays = settings.features or (), settings.lr or (), settings.weight_decay or ()
    heads = grid(names, rates, decays)
    encoder, width = job.encoder, 0
    if "stages" in names:
        if encoder.module is None:
            raise DataError("features=stages: raw pixels have no stages; choose pooled or standardised")
        width = feature_width(encoder.module)
        encoder = with_stages(encoder)
    held = _held_out(job, train, holdout, len(heads), encoder)
    subsets = labelled(job, train)
    rows = job.stored_features(train, encoder=encoder).to(job.device)
    test_rows = _test_rows(job, encoder, test, settings)
    runs, at_edge = [], False
    for seed, chosen in enumerate(subsets):
        choices = Choices(names, rows[chosen], width or rows.shape[1])
        widths = {name: values.shape[1] for name, values in choices(rows[:1]).items()}
        together = HeadGrid(
            heads,
            widths,
            train.num_classes,
            optimizer="adam" if settings.solver == "adam" else "sgd",
            seed=job.settings.seed + seed,
            device=job.device,
        )
        part = train.select(chosen) if len(chosen) < len(train) else train
        _fit(job, settings, encoder, part, rows[chosen], together, choices, job.settings.seed + seed)
        best, more = 0, dict[str, Any]()
        if held is not None:
            made = choices(held[0])
            scores = [top_accuracy(together.head_logits(place, made), held[1]) for place in range(len(heads))]
            best = max(range(len(heads)), key=scores.__getitem__)  # ties: the first of the grid
            more |= {"holdout_top1": scores[best], "heads": len(heads)}
        head = heads[best]
        at_edge |= len(rates) > 1 and head.lr in (min(rates), max(rates))
        logits = torch.stack([together.head_logits(best, choices(rows)) for rows in test_rows]).mean(0)
        found = {"lr": head.lr, "weight decay": head.weight_decay}
        more["features"] = head.features
        runs.append(Run(len(chosen), found, accuracy(logits, test.labels.to(job.device)), more))
    optimizer = "Adam" if settings.solver == "adam" else "SGD with momentum 0.9"
    images = "random resized crops and flips" if settings.augment else "images without augmentation"
    description = (
        f"linear classifier on frozen features (preset {settings.preset}): {optimizer}, {settings.schedule} learning"
        f" rate, {settings.epochs} epochs of batches of {settings.batch_size} {images}; {runs[0].labels} labelled"
        f" images of {train.name}/train; of {len(heads)} heads (learning rate, weight decay, features) the best"
        f" {_chosen_by(holdout, len(heads))}; {_tested(test, test_rows)}"
    )
    result = classification_result(job, runs, test, description)
    for row, run in zip(result.table, runs, strict=True):
        row["chosen on the held-out part"] += f"  {run.more['features']}"
    if at_edge:
        result.warnings.append("the learning rate chosen is the smallest or largest tried")
    return result


def _fit(
    job: Job[Settings],
    settings: Settings,
    encoder: FrozenEncoder,
    train: Source,
    rows: Tensor,
    heads: HeadGrid,
    choices: Choices,
    seed: int,
) -> None:
    """Train the heads on the images of ``train``, whose features without augmentation are ``rows``."""
    epochs, batch_size = settings.epochs or 1, settings.batch_size or 1
    schedule = settings.schedule or "cosine"
    if settings.augment:
        with closing(
            AugmentedRows(
                encoder,
                train,
                job.data,
                batch_size=batch_size,
                seed=seed,
                device=job.device,
                epochs=settings.augmented_epochs,
            )
        ) as augmented:
            batches = (batch for epoch in range(epochs) for batch in augmented.epoch(epoch))
            train_heads(heads, choices, batches, steps=epochs * augmented.steps, schedule=schedule)
        return
    labels = train.labels.to(job.device)
    cached = (batch for epoch in range(epochs) for batch in cached_batches(rows, labels, batch_size, epoch, seed))
    train_heads(heads, choices, cached, steps=epochs * -(-len(rows) // batch_size), schedule=schedule)


def _online(job: Job[Settings]) -> Result:
    """The probe that was trained beside the encoder, on what it was trained on."""
    settings = job.settings.settled()
    if job.target is None or job.encoder.step is None or job.encoder.data is None:
        raise CheckpointError("head=online scores the probe of a run; name a run folder")
    own = job.encoder.data
    if (job.data.source, job.data.folder, job.data.url) != (own.source, own.folder, own.url):
        raise DataError(f"head=online was fitted on {own.source} in {own.folder}; it can be scored on nothing else")
    checkpoint = job.target / "checkpoints" / f"step-{job.encoder.step:08d}"
    path = checkpoint / "probe.safetensors"
    if not path.exists():
        raise CheckpointError(f"{checkpoint} holds no online probe: its data has no labels of one class an image")
    if job.settings.labels != "all":
        raise DataError("head=online was fitted in pretraining, with all labels; remove labels")
    train, _, test = job.splits()
    with damage_named(checkpoint):
        probe = load_tensors(path)
        weight, bias = (probe[f"{name}"].to(job.device) for name in ("weight", "bias"))
    if len(weight) != test.num_classes:
        raise DataError(f"the online probe tells {len(weight)} classes apart, {test.name} has {test.num_classes}")
    test_rows = _test_rows(job, job.encoder, test, settings)
    logits = torch.stack([rows @ weight.T + bias for rows in test_rows]).mean(0)
    description = (
        f"the linear probe that was trained on detached features beside the encoder (labels of {train.name}, augmented"
        f" views, encoder still changing); {_tested(test, test_rows)}"
    )
    run = Run(len(train), {}, accuracy(logits, test.labels.to(job.device)))
    return classification_result(job, [run], test, description)


def _held_out(
    job: Job[Settings], train: Source, holdout: Source | None, choices: int, encoder: FrozenEncoder | None = None
) -> tuple[Tensor, Tensor] | None:
    """Features and labels of the held-out part, if there is anything to choose."""
    if choices == 1:
        return None
    if holdout is None:
        raise DataError(f"{train.name} has no held-out part to choose the settings on; set data.holdout above 0")
    return job.stored_features(holdout, encoder=encoder).to(job.device), holdout.labels.to(job.device)


def _test_rows(job: Job[Settings], encoder: FrozenEncoder, test: Source, settings: Settings) -> Tensor:
    """[crops, N, d]."""
    rows = job.stored_features(test, encoder=encoder, ten_crop=bool(settings.ten_crop)).to(job.device)
    return rows if settings.ten_crop else rows[None]


def _chosen_by(holdout: Source | None, choices: int) -> str:
    return "as given" if choices == 1 or holdout is None else f"chosen by the held-out part ({len(holdout)} images)"


def _tested(test: Source, rows: Tensor) -> str:
    return f"all {len(test)} test images" + (f", logits averaged over {len(rows)} crops" if len(rows) > 1 else "")
