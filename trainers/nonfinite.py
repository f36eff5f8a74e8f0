"""A step whose loss or weights are NaN or infinite: the run ends and says why, or the step is undone and counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.batch import ViewBatch
from pipelines.loading import Loader
from trainers.engine import Engine, Ranks
from trainers.failures import TrainingError
from trainers.methods import BaseMethod
from trainers.runlog import RunLog
from trainers.step import StepResult, optimise, update_method

_LOOK_EVERY = 32  # steps, at most: reading the device's flags waits for the device

T = TypeVar("T")


@dataclass(slots=True)
class _Step:
    """What is kept of a step until it is known to be sound: tensors on the device, small, and made by few launches."""

    number: int  # from 1, as in the rows
    lr: float
    indices: Tensor  # [N] of this rank
    scalars: dict[str, Tensor]
    weights: Tensor  # the largest norm of one after the update: not finite if any is not, or their gradient
    images: dict[str, Tensor]  # "views" and each embedding -> [V, N], the sum of the image's values: finite if they are


class NonfiniteGuard:
    """Makes the steps of a run, and answers for their loss and weights being finite (``engine.nonfinite``).

    ``stop``: flags stay on the device and are read at the log's interval, at least every 32 steps, and before an
    evaluation or a checkpoint. ``skip``: the device is waited for in every step, and weights and optimizer are copied
    before it. Every rank comes to the same answer.
    """

    def __init__(self, engine: Engine, method: BaseMethod, loader: Loader, directory: Path, log: RunLog) -> None:
        self.engine, self.method, self.loader, self.directory, self.log = engine, method, loader, directory, log
        self.config, self.ranks = engine.config, engine.ranks
        self._weights = [p.detach() for p in method.parameters() if p.requires_grad]
        self._unread: list[_Step] = []
        self._in_a_row = 0
        self._before = _Before(engine, method) if self.config.nonfinite == "skip" else None
        if self._before is not None and log.skipped_steps is None:
            log.skipped_steps = 0

    def step(
        self,
        number: int,
        micro_batches: Sequence[ViewBatch],
        lr: float,
        observe: Callable[[StepResult], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Train step ``number`` (from 1) and ``observe`` it; returns the scalars to log, none of a step undone.

        Raises:
            TrainingError: the loss or the weights of a step are not finite, or too many steps were undone.
        """
        if self._before is not None:
            self._before.take()
        result = optimise(self.engine, self.method, micro_batches, lr)
        self._unread.append(self._facts(number, micro_batches, lr, result))
        if self._before is not None and (told := self._first_bad()):
            self._before.put_back()
            self._count(told)
            return {}
        self._in_a_row = 0
        update_method(self.engine, self.method, result)
        scalars = result.scalars | observe(result)
        if 0 in (number % self.log.config.every_steps, number % _LOOK_EVERY, number - self.log.total_steps):
            self.look()
        return scalars

    def look(self) -> None:
        """Read the flags of the steps since the last look; every rank calls it at the same step.

        Raises:
            TrainingError: one of the steps was not finite; the dump of its batch is written.
        """
        if told := self._first_bad():
            raise TrainingError(
                f"{told}; lower optim.lr, lengthen schedule.warmup_epochs or set engine.gradient_clipping, in a new"
                " run.dir, or go on with engine.nonfinite=skip, which undoes such steps"
            )

    def before_save(self, step: int) -> None:
        """Refuse to write a checkpoint that nothing could go on from; every rank calls it.

        Raises:
            TrainingError: weights, the method's buffers or the optimizer's state are not finite.
        """
        self.look()
        tensors = dict(self.method.state_dict()) | self.engine.optimizer_state()
        floats = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
        finite = [value.isfinite().all().to(self.ranks.device) for value in floats.values()]
        flags = torch.stack(finite).tolist() if finite else []
        bad = [name for name, sound in zip(floats, flags, strict=True) if not sound]
        if any(named := _gathered(self.ranks, bad)):
            names = sorted({name for own in named for name in own})
            raise TrainingError(
                f"step {step}: no checkpoint is written, for {len(names)} of its tensors hold NaN or infinity"
                f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}); the loss was finite: lower optim.lr, or"
                " set engine.gradient_clipping"
            )

    def _facts(self, number: int, micro_batches: Sequence[ViewBatch], lr: float, result: StepResult) -> _Step:
        with torch.no_grad():
            weights = torch.stack(torch._foreach_norm(self._weights)).max()
            if self.engine.overflowed:
                weights = torch.full_like(weights, math.nan)  # what they would be
            views = [_image_sums(micro.views) for micro in micro_batches]
            images = {"views": views[0] if len(views) == 1 else torch.cat(views, dim=1)}
            embeddings = result.embeddings.items()
            images |= {name: _image_sums(value) for name, value in embeddings if value.is_floating_point()}
        return _Step(number, lr, result.batch.indices, result.scalars, weights, images)

    def _first_bad(self) -> str | None:
        """What is wrong with the first bad step of those unread, on whichever rank, its dump written; or None."""
        steps, self._unread = self._unread, []
        if not steps:
            return None
        values = torch.stack([value for step in steps for value in (step.scalars["loss"], step.weights)])
        flags = (~values.isfinite()).view(-1, 2).any(1).tolist()
        if not self.ranks.any(any(flags)):
            return None
        first = min(_gathered(self.ranks, flags.index(True) if any(flags) else len(steps)))
        reports = _gathered(self.ranks, _report(steps[first], self.loader, self.ranks.rank))
        return self._told(steps[first], reports)

    def _told(self, step: _Step, reports: list[dict[str, Any]]) -> str:
        epoch, step_in_epoch = divmod(step.number - 1, self.loader.steps_per_epoch)
        cause = _cause(reports)
        path = self.directory / "nonfinite" / f"step-{step.number:08d}.json"
        facts = {"step": step.number, "epoch": epoch, "step_in_epoch": step_in_epoch, "lr": step.lr, "cause": cause}
        listed = f"its images are listed in {path}"
        if self.ranks.is_main:
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(facts | {"ranks": reports}, indent=1) + "\n")
            except OSError as error:  # a full disk must not take the place of the cause, nor end a run that may skip
                listed = f"its images could not be listed: {error}"
        listed = self.ranks.from_main(listed)
        named = sorted({f"{name} {value}" for report in reports for name, value in report["nonfinite"].items()})
        scalars = f" ({', '.join(named)})" if named else ""
        return f"step {step.number} (lr {step.lr:.3g}): {cause}{scalars}; {listed}"

    def _count(self, told: str) -> None:
        config = self.config
        self._in_a_row += 1
        total = self.log.skipped_steps = (self.log.skipped_steps or 0) + 1
        self.log.say(f"skipped {told}; {total} skipped so far")
        if self._in_a_row > config.skips_in_a_row or total > config.skips:
            raise TrainingError(
                f"{told}; {self._in_a_row} steps in a row and {total} in all were skipped, more than"
                f" engine.skips_in_a_row={config.skips_in_a_row} or engine.skips={config.skips} allows: lower optim.lr,"
                " or set engine.gradient_clipping"
            )


class _Before:
    """A copy of all that an optimizer step changes, but for the method's ``update``: weights, BatchNorm, optimizer."""

    def __init__(self, engine: Engine, method: BaseMethod) -> None:
        self.engine = engine
        self._live: list[Tensor] = [p.detach() for p in method.parameters() if p.requires_grad]
        for module in method.modules():
            if isinstance(module, _BatchNorm):
                self._live += list(module.buffers(recurse=False))
        self._kept = [torch.empty_like(tensor) for tensor in self._live]
        self._optimizer: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)
        live_state = self.engine.optimizer_state()
        self._optimizer = {name: self._optimizer.get(name, torch.empty_like(v)) for name, v in live_state.items()}
        for name, value in live_state.items():
            self._optimizer[name].copy_(value)

    @torch.no_grad()
    def put_back(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept)
        self.engine.restore_optimizer_state(self._optimizer)


def _image_sums(values: Tensor) -> Tensor:
    """[V, N, …] -> [V, N], not finite if a value is not: one pass, and a tenth of what a maximum costs on a CPU."""
    return values.detach().sum(tuple(range(2, values.dim()))) if values.dim() > 2 else values.detach()


def _report(step: _Step, loader: Loader, rank: int) -> dict[str, Any]:
    """One rank's part of a dump, as JSON takes it: floats that are not finite become text."""
    indices, source = step.indices.cpu(), loader.source
    scalars = {name: float(value) for name, value in step.scalars.items()}
    broken = {name: indices[~sums.isfinite().all(0).cpu()].tolist() for name, sums in step.images.items()}
    return {
        "rank": rank,
        "indices": indices.tolist(),  # positions in the split, which views are drawn by
        "ids": source.ids[indices].tolist(),  # positions in the stored set
        "labels": source.labels[indices].tolist(),
        "images": [source.images.where(index) for index in indices.tolist()],
        "scalars": {name: value if math.isfinite(value) else str(value) for name, value in scalars.items()},
        # NaN says of all scalars but the loss that they are not known in this step
        "nonfinite": {n: str(v) for n, v in scalars.items() if math.isinf(v) or (n == "loss" and math.isnan(v))},
        "nonfinite_images": {name: rows for name, rows in broken.items() if rows},  # by tensor, their indices
        "updated_weights_finite": bool(step.weights.isfinite()),
    }


def _cause(reports: list[dict[str, Any]]) -> str:
    """Where it began, in a few words: tensors are looked at in the order in which they are made."""
    ranks = [report for report in reports if report["nonfinite_images"]]
    on = f" on rank {', '.join(str(report['rank']) for report in ranks)}" if 0 < len(ranks) < len(reports) else ""
    names = list(dict.fromkeys(name for report in ranks for name in report["nonfinite_images"]))
    if names:
        count = sum(len(report["nonfinite_images"].get(names[0], ())) for report in ranks)
        total = sum(len(report["indices"]) for report in reports)
        first = "the views" if names[0] == "views" else f"the embeddings ({', '.join(names)})"
        return f"{first} of {count} of {total} images are not finite{on}"
    if any("loss" in report["nonfinite"] for report in reports):
        return "the loss is not finite, though all embeddings are"
    return "the loss is finite, its gradient or the weights after its update are not"


def _gathered(ranks: Ranks, value: T) -> list[T]:
    """Every rank's value on every rank."""
    if ranks.control is None:
        return [value]
    box: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(box, value, group=ranks.control)
    return box
