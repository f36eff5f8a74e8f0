"""Fine-tuning a detector on a fixed schedule, and its COCO average precision."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipelines.sources import DataError
from trainers.detection.data import DetectionSet, Objects, Target, TrainingImages, load_image, training_batches

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
REPORTS = 20  # lines of progress


@dataclass(frozen=True, slots=True)
class Schedule:
    """Of SGD: the rate climbs linearly over ``warmup`` iterations and falls to a tenth at each of ``milestones``."""

    iterations: int
    batch_size: int
    lr: float
    warmup: int
    milestones: tuple[int, ...]

    def rate(self, iteration: int) -> float:
        warm = min(1.0, 1e-3 + (1 - 1e-3) * iteration / self.warmup) if self.warmup else 1.0
        return float(self.lr * warm * 0.1 ** sum(iteration >= milestone for milestone in self.milestones))


def fine_tune(
    detector: nn.Module, data: DetectionSet, schedule: Schedule, device: torch.device, *, seed: int, workers: int = 0
) -> list[float]:
    """Train in place; returns the loss of every iteration. On a CPU the same seed gives the same bits.

    Raises:
        DataError: an image cannot be decoded, or the loss is no longer finite.
    """
    torch.manual_seed(seed)  # the short sides, and which regions are sampled
    detector.to(device).train()
    optimizer = torch.optim.SGD(_groups(detector), lr=schedule.lr, momentum=MOMENTUM)
    batches = training_batches(len(data.images), schedule.batch_size, schedule.iterations, seed)
    loader = DataLoader(
        TrainingImages(data.images),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_columns,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,
    )
    losses: list[float] = []
    running: list[Tensor] = []
    started = time.monotonic()
    every = max(1, schedule.iterations // REPORTS)
    for iteration, (images, targets) in enumerate(_in_one_line(loader)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(iteration)
        found = detector(
            [image.to(device, non_blocking=True) for image in images],
            [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets],
        )
        loss = torch.stack(list(found.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.append(loss.detach())
        if (iteration + 1) % every == 0 or iteration + 1 == schedule.iterations:
            values = torch.stack(running).tolist()  # the only wait for the device
            losses += values
            running.clear()
            _report(iteration + 1, schedule, sum(values) / len(values), time.monotonic() - started)
    return losses


def _in_one_line(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches; what a worker process complains of comes without its traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).splitlines()[-1].rpartition("DataError: ")[2]) from None


def _report(done: int, schedule: Schedule, loss: float, seconds: float) -> None:
    print(
        f"detect: iteration {done:,} of {schedule.iterations:,}, loss {loss:.3f}, {seconds / done:.2f} s each",
        file=sys.stderr,
    )
    if not loss < float("inf"):
        raise DataError(f"detect: the loss is {loss} at iteration {done:,}; lower lr, or look at the boxes")


def _groups(detector: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for all but the scales and shifts of normalisation."""
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    free = {id(value) for module in norms for value in module.parameters(recurse=False)}
    trained = [value for value in detector.parameters() if value.requires_grad]
    return [
        {"params": [value for value in trained if id(value) not in free], "weight_decay": WEIGHT_DECAY},
        {"params": [value for value in trained if id(value) in free], "weight_decay": 0.0},
    ]


def _columns(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in items], [target for _, target in items]


@dataclass(frozen=True, slots=True)
class Precision:
    """COCO's average precision in percent."""

    ap: float  # mean over the overlaps 0.50, 0.55, …, 0.95
    ap50: float
    ap75: float
    per_class: list[float | None]  # ap; None for a class without an object to find


@torch.no_grad()
def coco_precision(detector: Any, images: list[Objects], classes: int, device: torch.device, side: int) -> Precision:
    """Of a detector in evaluation mode on whole images, their short side resized to ``side``."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_type="bbox", class_metrics=True)
    detector.to(device).eval()
    detector.transform.min_size = (side,)
    for one in images:
        (found,) = detector([load_image(one.image).to(device)])
        metric.update([{name: value.cpu() for name, value in found.items()}], [one.target()])
    scores = metric.compute()
    per_class: list[float | None] = [None] * classes
    labels, values = scores["classes"].reshape(-1).tolist(), scores["map_per_class"].reshape(-1).tolist()
    for label, value in zip(labels, values, strict=True):
        per_class[label - 1] = 100 * value if value >= 0 else None  # -1: nothing to find
    ap, ap50, ap75 = (100 * scores[name].item() for name in ("map", "map_50", "map_75"))
    return Precision(ap, ap50, ap75, per_class)
