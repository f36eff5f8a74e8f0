"""The protocols behind ``evaluate.py``, one file each: what is fitted on what, chosen where, scored how.

A protocol file defines ``Settings`` (a ``ProtocolSettings``) and ``score(job) -> Result``; the first line of its
docstring is the command's help. To add one, add the file: the registry below finds it. Rules for all of them:

* settings are chosen on the held-out part of the training images, never on test;
* test is scored whole, once, in evaluation mode;
* a frozen encoder comes out as it went in, buffers included;
* the description says in a sentence or two all that a reader needs to compare the number with another.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipelines.config import Section
from pipelines.sources import DataConfig, DataError, Source, describe, open_source
from pipelines.subsets import label_subset, load_subset, save_subset
from trainers.encoders import EncoderConfig
from trainers.features import FrozenEncoder, features_of
from trainers.scores import Accuracy, bootstrap_interval, confusion_picture


class ProtocolSettings(Section):
    """What ``key=value`` can say to every protocol. ``data.*`` and ``encoder.*`` are those of a recipe."""

    needs_data: ClassVar[bool] = True  # False: the protocol's own keys name its images

    seed: int = Field(0, ge=0, lt=2**62)  # of a random encoder and of a protocol's own draws, but not of labels
    size: int | None = Field(None, ge=1, le=4096)  # pixels, for baselines; a trained encoder knows its own
    data: dict[str, Any] = Field(default={})
    encoder: EncoderConfig = EncoderConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ClassificationSettings(ProtocolSettings):
    labels: str = "all"  # or 10%, 1%, 10-per-class, an index file (.json), or a list of image names (.txt)
    seeds: int = Field(3, ge=1)  # label subsets to average over, always the same ones; with all labels there is one


S = TypeVar("S", bound=ProtocolSettings)
C = TypeVar("C", bound=ClassificationSettings)


@dataclass(frozen=True, slots=True)
class Job(Generic[S]):
    """One evaluation: an encoder, what was asked for, and the data."""

    encoder: FrozenEncoder
    settings: S
    data: DataConfig
    device: torch.device
    target: Path | None = None  # the run folder or weights that the encoder is from
    group: dist.ProcessGroup | None = None  # of the processes that do this evaluation together; None: this one alone

    @property
    def is_main(self) -> bool:
        return self.group is None or dist.get_rank(self.group) == 0

    def refuse_several_processes(self, protocol: str) -> None:
        """For protocols that train, which each process would do for itself.

        Raises:
            DataError: there are several.
        """
        if self.group is not None:
            raise DataError(f"{protocol} runs in one process; start it without torchrun or deepspeed")

    def splits(self) -> tuple[Source, Source | None, Source]:
        """train, holdout (if there is one) and test, of one class an image, opened before any feature is computed.

        With a list of image names as labels, train is all training images, so that it has every image of a published
        list, and holdout has none that the list names.

        Raises:
            DataError: images have several labels, or the list does not fit.
        """
        listed = None
        if isinstance(self.settings, ClassificationSettings) and self.settings.labels.endswith(".txt"):
            listed = Path(self.settings.labels)
        train = open_source(self.data if listed is None else self.data.model_copy(update={"holdout": 0.0}), "train")
        if train.multi_label:
            raise DataError(
                f"{train.name} has several labels an image; this protocol needs exactly one (voc07 does not)"
            )
        holdout = open_source(self.data, "holdout") if describe(self.data).counts["holdout"] else None
        if listed is not None and holdout is not None:
            free = ~torch.isin(holdout.ids, train.ids[load_subset(listed, train)])
            holdout = holdout.select(free.nonzero()[:, 0]) if free.any() else None
        return train, holdout, open_source(self.data, "test")

    def stored_features(
        self, source: Source, *, encoder: FrozenEncoder | None = None, ten_crop: bool = False
    ) -> Tensor:
        """Features [N, d] of a split on the host, or [crops, N, d]; extracted by all processes together.

        Raises:
            DataError: some are not finite: the weights are those of a run that diverged.
        """
        encoder = encoder or self.encoder
        found = features_of(encoder, source, self.device, self.data, ten_crop=ten_crop, group=self.group)
        if not all(part.isfinite().all() for part in found.split(2**16, dim=-2)):
            raise DataError(f"{encoder.label}: its features of {source.name} are not all finite; the run diverged")
        return found

    def features(self, source: Source) -> tuple[Tensor, Tensor]:
        """Features [N, d] and labels of a split, on the device."""
        return self.stored_features(source).to(self.device), source.labels.to(self.device)


def labelled(job: Job[C], train: Source) -> list[Tensor]:
    """Positions of the images whose labels may be used, once for each seed, kept as index files."""
    budget = job.settings.labels
    if budget.endswith((".json", ".txt")):
        return [load_subset(Path(budget), train)]
    chosen = [label_subset(train, budget, seed) for seed in range(1 if budget == "all" else job.settings.seeds)]
    if budget != "all" and job.is_main:
        folder = job.encoder.folder / "labels"
        folder.mkdir(parents=True, exist_ok=True)
        for seed, positions in enumerate(chosen):
            name = f"{train.name}-{train.fingerprint()[:8]}-{budget.replace('%', 'pct')}-seed{seed}.json"
            save_subset(folder / name, train, positions, budget=budget, seed=seed)
    return chosen


@dataclass(slots=True)
class Result:
    """What an evaluation found. ``metric`` names ``value``; percentages are of 100."""

    metric: str
    value: float
    n_test: int  # images scored
    description: str  # the protocol, in a sentence or two
    table: list[dict[str, str]]  # for the terminal and the report: rows, by column
    scores: dict[str, float | None] = field(default_factory=dict)  # for the JSON line and TensorBoard
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON line
    details: dict[str, Any] = field(default_factory=dict)  # for the record only
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG files by name, beside the record
    warnings: list[str] = field(default_factory=list)
    data: str | None = None  # what was scored, where it is not the job's data source


def protocol_names() -> list[str]:
    """The protocols there are, from the files of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_protocol(name: str) -> ModuleType:
    """The module of a protocol: its ``Settings`` and its ``score``."""
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True, slots=True)
class Run:
    """A classifier fitted with one draw of the labelled images, and what it got on test."""

    labels: int  # images whose labels were used
    chosen: dict[str, float]  # the settings that the held-out part chose, by name
    found: Accuracy
    more: dict[str, Any] = field(default_factory=dict)  # for the record


def classification_result(job: Job[C], runs: list[Run], test: Source, description: str) -> Result:
    """The means over the draws of labelled images, each draw in a row, and where the errors are."""
    top1, top5 = [run.found.top1 for run in runs], [run.found.top5 for run in runs]
    mean = statistics.fmean(top1)
    low, high = bootstrap_interval(100 * torch.stack([run.found.correct for run in runs]).double().mean(0))
    table = [
        {
            "labels": f"{run.labels:,}",
            "chosen on the held-out part": "  ".join(f"{name} {value:.3g}" for name, value in run.chosen.items())
            or "–",
            "test top-1 (%)": f"{run.found.top1:.2f}",
            "test top-5 (%)": "–" if run.found.top5 is None else f"{run.found.top5:.2f}",
        }
        for run in runs
    ]
    confusion = torch.stack([run.found.confusion for run in runs]).sum(0)
    details = {
        "per_class": dict(zip(test.classes, _class_means(runs), strict=True)),
        "confusion": confusion.tolist() if len(test.classes) <= 100 else None,
        "runs": [
            {"labels": run.labels, **run.chosen, "top1": run.found.top1, "top5": run.found.top5, **run.more}
            for run in runs
        ],
    }
    title = f"{job.encoder.label}: {mean:.1f} % right"
    return Result(
        metric="top1",
        value=mean,
        n_test=len(test),
        description=f"{description}; 95 % interval by bootstrap over the test images",
        table=table,
        scores={
            "top1": mean,
            "top5": None if top5[0] is None else statistics.fmean(value for value in top5 if value is not None),
            "standard_error": statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else None,
            "interval_low": low,
            "interval_high": high,
        },
        facts={"labels": job.settings.labels},
        details=details,
        pictures={"confusion": confusion_picture(confusion, test.classes, title)},
    )


def _class_means(runs: list[Run]) -> list[float | None]:
    """Over the runs, of each class's accuracy."""
    by_class = zip(*(run.found.per_class for run in runs), strict=True)
    return [None if None in values else statistics.fmean(v for v in values if v is not None) for values in by_class]
