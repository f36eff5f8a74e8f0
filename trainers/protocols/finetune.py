"""Fine-tuning of the whole network on labelled images, beside the same network trained from scratch."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipelines.labelled import LabelledViews, steps_of_epoch, training_view
from pipelines.sources import DataError, Source
from pipelines.subsets import stratified_draw
from pipelines.views import View
from trainers.dropout import add_dropout, dropout_rate
from trainers.encoders import build_encoder
from trainers.finetune import (
    Classifier,
    FinetuneConfig,
    Fit,
    HeldOut,
    curves_picture,
    default_batch_size,
    default_epochs,
    fit,
    held_out_score,
    low_precision,
    predict,
)
from trainers.protocols import ClassificationSettings, Job, Result, Run, classification_result, labelled
from trainers.scores import accuracy

Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Start = Literal["pretrained", "scratch"]
RATES = {"sgd": (0.05, 0.05), "adam": (5e-4, 5e-3), "lars": (3.0, 0.05)}  # body, head


class Settings(ClassificationSettings, FinetuneConfig):
    initial: Literal["pretrained", "scratch", "both"] = "both"
    lr_body: Rates | None = None  # all pairs with lr_head are tried; None: `RATES`
    lr_head: Rates | None = None
    # Random resized crops' share of the image's area, and how many are mirrored; None: 0.08 to 1 and half of them, of
    # digits those of the views.plan `digits`.
    crop_scale: tuple[float, float] | None = None
    flip: float | None = Field(None, ge=0, le=1)
    select_on: int = Field(10_000, ge=1)  # at most so many held-out images are scored after each epoch

    @field_validator("crop_scale")
    @classmethod
    def _a_share(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"expected [low, high] with 0 < low <= high <= 1, got {list(value)}")
        return value

    def rates(self) -> list[tuple[float, float]]:
        """The (lr_body, lr_head) to try."""
        body, head = RATES[self.optimizer]
        return list(itertools.product(self.lr_body or (body,), self.lr_head or (head,)))

    def view(self, source: str) -> View:
        """What a training image is seen as."""
        given = {"crop_scale": self.crop_scale, "flip": self.flip}
        return training_view(source).model_copy(update={key: v for key, v in given.items() if v is not None})


def score(job: Job[Settings]) -> Result:
    """Learning rates and epoch by the held-out part. The value is that of the pretrained start, where there is one."""
    job.refuse_several_processes("finetune")
    settings, encoder, starts = job.settings, job.encoder, _starts(job)
    train, holdout, test = job.splits()
    if holdout is None and (settings.patience or len(settings.rates()) > 1):
        raise DataError(
            f"{train.name} has no held-out part to choose learning rates or an epoch on; set data.holdout above 0, or"
            " patience=0 and one value each for lr_body and lr_head"
        )
    if holdout is not None and len(holdout) > settings.select_on:
        holdout = holdout.select(stratified_draw(holdout.labels.numpy(), settings.select_on, seed=0))
    validate = None
    if holdout is not None:
        validate = held_out_score(_as_trained(holdout, job), encoder.image_size, job.device, job.data)
    draws = [_draw(job, train, positions, number) for number, positions in enumerate(labelled(job, train))]
    progress = _Progress(sum(draw.epochs for draw in draws) * len(starts) * len(settings.rates()))
    runs: dict[Start, list[Run]] = {start: [] for start in starts}
    for draw in draws:
        with closing(_views(job, draw)) as views:
            for start in starts:
                runs[start].append(_run(job, start, draw, views, validate, test, progress))
    description = _describe(job, draws[0], holdout, test)
    result = _joined({start: classification_result(job, runs[start], test, description) for start in starts})
    histories: dict[str, list[Any]] = {start: [run.more["history"] for run in runs[start]] for start in starts}
    result.pictures["curves"] = curves_picture(histories, f"{encoder.label}, {settings.labels} labels")
    return result


@dataclass(frozen=True, slots=True)
class _Draw:
    """One draw of the labelled images, and how long is trained on it."""

    images: Source
    seed: int  # of what is drawn besides: weights, order, views
    batch_size: int
    steps: int  # of an epoch
    epochs: int


def _draw(job: Job[Settings], train: Source, positions: Tensor, number: int) -> _Draw:
    images, settings = _as_trained(train.select(positions), job), job.settings
    if len(images) < 2:
        raise DataError(f"labels={settings.labels}: BatchNorm cannot be trained on a single image; label more")
    batch_size = settings.batch_size or default_batch_size(len(images))
    steps = steps_of_epoch(len(images), batch_size)
    epochs = settings.epochs or default_epochs(len(images) / len(train), steps)
    return _Draw(images, settings.seed + number, batch_size, steps, epochs)


def _views(job: Job[Settings], draw: _Draw) -> LabelledViews:
    return LabelledViews(
        draw.images,
        job.settings.view(draw.images.name),
        size=job.encoder.image_size,
        batch_size=draw.batch_size,
        seed=draw.seed,
        device=job.device,
        loading=job.data,
    )


def _run(
    job: Job[Settings],
    start: Start,
    draw: _Draw,
    views: LabelledViews,
    validate: Callable[[nn.Module], HeldOut] | None,
    test: Source,
    progress: _Progress,
) -> Run:
    """Fit with every pair of learning rates, and score the best fit on test."""
    best: Fit | None = None
    chosen, tried = (0.0, 0.0), []
    for lr_body, lr_head in job.settings.rates():
        progress.begin(
            f"{start}, {len(draw.images):,} labels, seed {draw.seed}, lr {lr_body:g} {lr_head:g}", draw.epochs
        )
        with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(draw.seed)
            model = Classifier(_body(job, start), draw.images.num_classes, job.settings.head)
            found = fit(
                model,
                views,
                job.settings,
                lr_body=lr_body,
                lr_head=lr_head,
                epochs=draw.epochs,
                validate=validate,
                report=progress.epoch,
            )
        progress.end()
        held_out = None if found is None or found.held_out is None else found.held_out.top1
        tried.append({"lr_body": lr_body, "lr_head": lr_head, "diverged": found is None, "held_out_top1": held_out})
        if found is not None and found.better_than(best):
            best, chosen = found, (lr_body, lr_head)
    if best is None:
        raise DataError(
            f"training diverged ({start}) with each of the (lr_body, lr_head) tried: {job.settings.rates()}; choose"
            " smaller ones"
        )
    model.load_state_dict(best.state)
    logits = predict(model, _as_trained(test, job), job.encoder.image_size, job.device, job.data)
    held_out = None if best.held_out is None else best.held_out.top1
    by_holdout = {} if validate is None else {"epoch": float(best.epoch)}
    if len(tried) > 1:
        by_holdout = {"lr_body": chosen[0], "lr_head": chosen[1], **by_holdout}
    more = {
        "seed": draw.seed,
        "lr_body": chosen[0],
        "lr_head": chosen[1],
        "held_out_top1": held_out,
        "tried": tried,
        "history": best.history,
    }
    return Run(len(draw.images), by_holdout, accuracy(logits, test.labels.to(job.device)), more)


def _starts(job: Job[Settings]) -> tuple[Start, ...]:
    """What the network is to start from."""
    encoder, initial = job.encoder, job.settings.initial
    if encoder.module is None:
        raise DataError("raw pixels have no weights to fine-tune; name a run or weights, or --baseline random")
    untrained = encoder.identity.startswith("random-")
    if untrained and initial == "pretrained":
        raise DataError("initial=pretrained, and --baseline random has no pretrained weights; leave one of them out")
    if encoder.config is None and initial != "pretrained":
        raise DataError(f"initial={initial}: {encoder.label} cannot be built anew from scratch; set initial=pretrained")
    if untrained or initial == "scratch":
        return ("scratch",)
    return ("pretrained", "scratch") if initial == "both" else ("pretrained",)


def _body(job: Job[Settings], start: Start) -> nn.Module:
    """A network to be trained: a copy of the encoder, or the same one with weights drawn anew."""
    encoder = job.encoder
    assert encoder.module is not None
    if start == "pretrained":
        return copy.deepcopy(encoder.module)
    assert encoder.config is not None
    module = build_encoder(encoder.config, encoder.image_size)
    if (rate := dropout_rate(encoder.module)) > 0:
        add_dropout(module, rate)
    return module


def _as_trained(source: Source, job: Job[Settings]) -> Source:
    """With the statistics that the encoder was trained with."""
    return replace(source, mean=job.encoder.mean, std=job.encoder.std)


def _describe(job: Job[Settings], draw: _Draw, held: Source | None, test: Source) -> str:
    settings, view = job.settings, job.settings.view(draw.images.name)
    momentum = 0.9 if settings.momentum is None else settings.momentum
    optimizer = {
        "sgd": f"SGD with Nesterov momentum {momentum:g}",
        "adam": "Adam",
        "lars": f"LARS with momentum {momentum:g}",
    }[settings.optimizer]
    rates = " or ".join(f"{body:g} (body) and {head:g} (head)" for body, head in settings.rates())
    chosen = "the last epoch's weights, nothing being held out"
    if held is not None:
        several = "learning rates and epoch" if len(settings.rates()) > 1 else "epoch"
        patience = f", {settings.patience} epochs without improvement ending a fit" if settings.patience else ""
        chosen = f"{several} chosen by the held-out part ({len(held):,} labelled images){patience}"
    precision = "bfloat16" if low_precision(settings, job.device) else "float32"
    baseline = "; scratch: the same from random weights" if len(_starts(job)) > 1 else ""
    return (
        f"all weights and a linear classifier trained on {len(draw.images):,} labelled images of"
        f" {draw.images.name}/train for {draw.epochs} epochs of {draw.steps} steps, {optimizer}, {settings.schedule}"
        f" learning rate of {rates}, weight decay {settings.weight_decay:g}, {precision}, random resized crops"
        f" ({view.crop_scale[0]:g} to {view.crop_scale[1]:g} of the area), mirrored with probability {view.flip:g};"
        f" {chosen}{baseline}; all {len(test):,} test images, a central view each"
    )


def _joined(results: dict[Start, Result]) -> Result:
    """One result of all starts; the first one's is the value."""
    first, *others = results
    result, table = results[first], []
    for start, part in results.items():
        table += [{"start": start, **row} for row in part.table]
        if (error := part.scores["standard_error"]) is not None:
            mean = {"start": start, "labels": "mean", "test top-1 (%)": f"{part.value:.2f} ± {error:.2f}"}
            table.append({column: mean.get(column, "") for column in table[-1]})
    result.table = table
    result.facts["initial"] = first
    for start in others:
        part = results[start]
        result.scores |= {f"{start}_{name}": part.scores[name] for name in ("top1", "standard_error")}
        result.scores[f"gain_over_{start}"] = result.value - part.value
        result.details[start] = part.details
    return result


class _Progress:
    """A line about each epoch on stderr, at most one a second, with the time that all fits together will still take."""

    def __init__(self, epochs: int) -> None:
        self.left, self.done, self.started, self.shown = epochs, 0, time.monotonic(), -math.inf
        self.name, self.epochs, self.left_after = "", 0, epochs

    def begin(self, name: str, epochs: int) -> None:
        self.name, self.epochs, self.left_after = name, epochs, self.left - epochs

    def epoch(self, row: dict[str, float]) -> None:
        self.left, self.done = self.left - 1, self.done + 1
        now = time.monotonic()
        if now - self.shown < 1 and row["epoch"] < self.epochs:
            return
        self.shown = now
        held_out = f", held-out {row['held_out_top1']:.2f} %" if "held_out_top1" in row else ""
        seconds = (now - self.started) / self.done * self.left
        text = f"{self.name}: epoch {row['epoch']:.0f}/{self.epochs}, loss {row['loss']:.4f}{held_out}"
        print(f"{text}, {seconds:.0f} s left", file=sys.stderr, flush=True)

    def end(self) -> None:
        """A fit may end before its last epoch."""
        self.left = self.left_after
