"""Detection transfer: Faster R-CNN (C4 or FPN) fine-tuned from the encoder on VOC or COCO, as COCO AP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from pipelines.sources import DataError
from trainers.detection.data import DetectionSet, read_coco, read_voc
from trainers.detection.models import Sizes, build_detector
from trainers.detection.training import Precision, Schedule, coco_precision, fine_tune
from trainers.dropout import add_dropout, dropout_rate
from trainers.encoders import build_encoder
from trainers.features import FrozenEncoder
from trainers.protocols import Job, ProtocolSettings, Result
from trainers.scores import as_png

Side = Annotated[int, Field(ge=16, le=8192)]


@dataclass(frozen=True, slots=True)
class Usual:
    """What a format's settings are where nothing else is asked for: MoCo's (arXiv:1911.05722)."""

    train: tuple[str, ...]
    test: str
    iterations: int
    decay: tuple[float, ...]
    sides: tuple[int, ...]


USUAL = {
    "voc": Usual(
        ("VOC2007/trainval", "VOC2012/trainval"), "VOC2007/test", 24_000, (3 / 4, 11 / 12), tuple(range(480, 801, 32))
    ),
    "coco": Usual(("train2017",), "val2017", 180_000, (2 / 3, 8 / 9), tuple(range(640, 801, 32))),
}


class Settings(ProtocolSettings):
    needs_data: ClassVar[bool] = False

    format: Literal["voc", "coco"] = "voc"
    root: Path = Path("data/VOCdevkit")
    train: tuple[str, ...] | None = Field(None, min_length=1)  # parts of the tree; None: the format's usual ones
    test: str | None = None
    model: Literal["c4", "fpn"] = "c4"
    initial: Literal["encoder", "random"] = "encoder"  # random: the same architecture untrained, to compare with
    iterations: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float | None = Field(None, gt=0)  # None: 0.02 for 16 images, in proportion
    warmup: int = Field(100, ge=0)  # iterations
    decay: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None  # shares of the iterations, each a tenth of lr
    sides: tuple[Side, ...] | None = Field(None, min_length=1)  # short sides to train at
    test_side: Side = 800
    longest: Side = 1333
    regions: int = Field(512, ge=1)  # of an image that the box head is trained on
    test_regions: int = Field(1000, ge=1)
    batchnorm: Literal["trained", "frozen"] = "trained"
    extra_norm: bool = True  # c4: a BatchNorm after layer4
    freeze: int = Field(0, ge=0, le=5)  # of stem, layer1, layer2, …
    workers: int = Field(4, ge=0)  # processes that decode


def score(job: Job[Settings]) -> Result:
    """The value is AP over the overlaps 0.50 to 0.95. The schedule is fixed: test is looked at once, at its end."""
    settings = job.settings
    job.refuse_several_processes("detect")
    if find_spec("pycocotools") is None:
        raise DataError("detect scores with pycocotools, which is not installed: pip install 'twinstream[detect]'")
    usual = USUAL[settings.format]
    read = read_voc if settings.format == "voc" else read_coco
    train_parts, test_part = settings.train or usual.train, settings.test or usual.test
    if test_part in train_parts:
        raise DataError(f"detect: test={test_part} is among the parts to train on")
    train = read(settings.root, train_parts)
    test = read(settings.root, (test_part,), train.classes)
    if shared := {one.image.resolve() for one in train.images} & {one.image.resolve() for one in test.images}:
        raise DataError(f"detect: {len(shared)} test images are among those to train on, such as {min(shared)}")
    schedule = _schedule(settings, usual)
    sizes = Sizes(settings.sides or usual.sides, settings.longest, settings.regions, settings.test_regions)
    if settings.longest < max(*sizes.sides, settings.test_side):
        raise DataError(f"detect: longest={settings.longest} is below the short sides; raise it, or lower them")
    detector = build_detector(
        _start(job),
        settings.model,
        len(train.classes),
        sizes,
        train_batchnorm=settings.batchnorm == "trained",
        extra_norm=settings.extra_norm,
        freeze=settings.freeze,
        seed=settings.seed,
    )
    chosen = train.trainable()
    losses = fine_tune(detector, chosen, schedule, job.device, seed=settings.seed, workers=settings.workers)
    found = coco_precision(detector, test.images, len(test.classes), job.device, settings.test_side)
    return _result(job, train_parts, test_part, chosen, test, schedule, sizes, losses, found)


def _schedule(settings: Settings, usual: Usual) -> Schedule:
    iterations = settings.iterations or usual.iterations
    lr = settings.lr or 0.02 * settings.batch_size / 16
    milestones = tuple(round(share * iterations) for share in settings.decay or usual.decay)
    return Schedule(iterations, settings.batch_size, lr, settings.warmup, milestones)


def _start(job: Job[Settings]) -> FrozenEncoder:
    """The encoder to begin from."""
    encoder = job.encoder
    if job.settings.initial == "encoder" or encoder.config is None:
        return encoder
    torch.manual_seed(job.settings.seed)
    module = build_encoder(encoder.config, encoder.image_size)
    if encoder.module is not None and (rate := dropout_rate(encoder.module)) > 0:
        add_dropout(module, rate)  # else it would not be the same network
    return replace(encoder, module=module)


def _result(
    job: Job[Settings],
    train_parts: tuple[str, ...],
    test_part: str,
    train: DetectionSet,
    test: DetectionSet,
    schedule: Schedule,
    sizes: Sizes,
    losses: list[float],
    found: Precision,
) -> Result:
    settings = job.settings
    start = "random weights" if settings.initial == "random" else "the encoder's weights"
    extra_norm = settings.model == "c4" and settings.extra_norm and settings.batchnorm == "trained"
    sides = f"{min(sizes.sides)} to {max(sizes.sides)}" if len(sizes.sides) > 1 else str(sizes.sides[0])
    description = (
        f"torchvision's Faster R-CNN, {settings.model}, from {start}; BatchNorm {settings.batchnorm}"
        + (", one more after layer4" if extra_norm else "")
        + (f", the first {settings.freeze} stages frozen" if settings.freeze else ", all layers trained")
        + f"; {len(train.images)} images of {' + '.join(train_parts)} without what is marked difficult or a crowd;"
        f" {schedule.iterations} iterations of {schedule.batch_size} images, SGD, lr {schedule.lr:g} after"
        f" {schedule.warmup} of warm-up, a tenth at {', '.join(map(str, schedule.milestones))}; short side {sides},"
        f" flips; COCO AP (pycocotools) on all {len(test.images)} images of {test_part} at short side"
        f" {settings.test_side}, {sizes.test_regions} regions, objects marked difficult or a crowd not counted; the"
        " last weights are scored, nothing is chosen on test"
    )
    scores = {"ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}
    shown = {"AP (%)": found.ap, "AP50 (%)": found.ap50, "AP75 (%)": found.ap75}
    row = {"model": settings.model, "from": start, "iterations": f"{schedule.iterations:,}"}
    return Result(
        metric="ap",
        value=found.ap,
        n_test=len(test.images),
        description=description,
        table=[row | {name: f"{value:.2f}" for name, value in shown.items()}],
        scores=dict(scores),
        facts={"model": settings.model, "initial": settings.initial, "iterations": schedule.iterations},
        details={"per_class": dict(zip(test.classes, found.per_class, strict=True)), "losses": losses},
        pictures={"loss": _loss_picture(losses, schedule, job.encoder.label)},
        data=settings.format,
    )


def _loss_picture(losses: list[float], schedule: Schedule, label: str) -> bytes:
    """A PNG of the training loss, in means over a hundredth of the run, and where the rate falls."""
    from matplotlib.figure import Figure

    width = max(1, len(losses) // 100)
    means = torch.tensor(losses[: len(losses) // width * width]).reshape(-1, width).mean(1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot((torch.arange(len(means)) + 0.5) * width, means, label=f"training loss, means over {width}")
    for milestone in schedule.milestones:
        axes.axvline(milestone, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="iteration (dotted: a tenth of the learning rate)", ylabel="loss", title=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return as_png(figure)
