"""What a run tells about itself: held-out kNN and online probe, signs of collapse, throughput, and where it is written.

Everything here looks at the training images and their held-out part. The test split is ``evaluate.py``'s alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from pipelines.plain_views import plain_batches
from pipelines.sources import Source
from trainers.encoders import feature_width
from trainers.engine import Ranks
from trainers.knn import knn_votes, top_accuracy
from trainers.step import StepResult

KNN_SETTINGS = ((20, 0.07), (200, 0.1))


class MonitorConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    every_epochs: float = Field(1.0, gt=0)
    images: int = Field(10_000, ge=1)  # at most this many held-out images, and as many to search among
    probe_lr: float = Field(1e-3, gt=0)  # Adam, for the online linear probe


class LogConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int = Field(10, ge=1)
    wandb: bool = False


class Probe(nn.Module):
    """A linear classifier trained beside the encoder on its detached features: what they are worth so far."""

    def __init__(self, features: int, classes: int, lr: float, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes).to(device)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr)

    def fit(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """One step on features [V, N, d] and labels [N] (-1: unlabelled, ignored); returns the loss.

        The loss is the mean over all labelled rows of all ranks, however unevenly they are spread.
        """
        rows = features.flatten(0, 1).float()
        targets = labels.repeat(features.shape[0])
        count = (targets >= 0).sum().float()
        if group is not None:
            dist.all_reduce(count, group=group)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.linear(rows), targets, ignore_index=-1, reduction="sum") / count.clamp_min(1)
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for tensor in [loss, *(p.grad for p in self.linear.parameters() if p.grad is not None)]:
                dist.all_reduce(tensor, group=group)
        self.optimizer.step()
        return loss

    def state(self) -> dict[str, Tensor]:
        tensors = dict(self.linear.state_dict())
        for name, parameter in self.linear.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}::{key}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        weights = {name: value for name, value in tensors.items() if "::" not in name}
        self.linear.load_state_dict(weights, strict=True)
        for name, parameter in self.linear.named_parameters():
            for full, value in tensors.items():
                owner, _, key = full.rpartition("::")
                if owner == name:
                    device = value.device if value.dim() == 0 else parameter.device
                    self.optimizer.state[parameter][key] = value.to(device).clone()


class Monitor:
    """Online probe in every step; kNN, probe accuracy and collapse figures on the held-out part now and then."""

    def __init__(
        self,
        config: MonitorConfig,
        encoder: nn.Module,
        train: Source | None,
        holdout: Source | None,
        *,
        size: int,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        """``train``: the labelled images to search among; ``holdout``: those to classify; ``size`` in pixels.

        Either may be missing. The probe needs labels of one class an image, kNN and accuracy the held-out part too.
        """
        self.config, self.encoder, self.size, self.batch_size, self.ranks = (
            config,
            encoder,
            size,
            batch_size,
            ranks,
        )
        self.bank = _spread(train, config.images)
        self.holdout = _spread(holdout, config.images)
        self.probe: Probe | None = None
        if train is not None and not train.multi_label and train.num_classes > 1:
            self.probe = Probe(feature_width(encoder), train.num_classes, config.probe_lr, ranks.device)

    def observe(self, result: StepResult) -> dict[str, Tensor]:
        """Called after each optimizer step; returns scalars to log with the method's."""
        if self.probe is None:
            return {}
        labels = result.batch.labels
        return {"probe_loss": self.probe.fit(result.embeddings["features"], labels, self.ranks.group)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores on the held-out part; every rank computes all of it, and so agrees without a word."""
        if self.holdout is None:
            return {}
        held_out = self._features(self.holdout)
        scores = {
            "holdout/feature_std": feature_std(held_out),
            "holdout/effective_rank": effective_rank(held_out),
        }
        if self.probe is not None and self.bank is not None:
            labels = self.holdout.labels.to(held_out.device)
            bank = self._features(self.bank)
            bank_labels = self.bank.labels.to(held_out.device)
            votes = knn_votes(held_out, bank, bank_labels, self.bank.num_classes, KNN_SETTINGS)
            for (k, temperature), vote in votes.items():
                scores[f"holdout/knn_k{k}_t{temperature:g}"] = top_accuracy(vote, labels)
            scores["holdout/probe"] = top_accuracy(self.probe.linear(held_out), labels)
        return scores

    def _features(self, source: Source) -> Tensor:
        training = self.encoder.training
        self.encoder.eval()
        batches = plain_batches(source, self.size, self.batch_size, self.ranks.device)
        features = torch.cat([self.encoder(images).float() for images, _ in batches])
        self.encoder.train(training)
        return features


class RunLog:
    """Averages scalars on the device and writes them, every so many steps, to all that listen.

    ``metrics.jsonl`` and TensorBoard always, a line on the terminal, Weights & Biases if asked for. Keys that depend
    on the machine's speed begin with ``time/``; all others are equal in two equal runs.
    """

    def __init__(
        self,
        config: LogConfig,
        run_dir: Path,
        ranks: Ranks,
        *,
        total_steps: int,
        batch_size: int,
        recipe: Any,
    ) -> None:
        self.config, self.total_steps, self.batch_size = config, total_steps, batch_size
        self.active = ranks.is_main
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._interval_start = time.perf_counter()
        self._waited = 0.0
        self._interval_steps = 0
        self._path = run_dir / "metrics.jsonl"
        self._run_dir = run_dir
        self._recipe = recipe
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def open(self, step: int) -> None:
        """Start writing after ``step``; rows of steps that a resumed run will do again are dropped."""
        if not self.active:
            return
        if self._path.exists():
            rows = [row for row in _readable_rows(self._path) if json.loads(row)["step"] <= step]
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(rows))
            draft.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self._wandb = _start_wandb(self._run_dir, self._recipe) if self.config.wandb else None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("pretraining", total=self.total_steps, completed=step)
            self._progress.start()

    def close(self) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def restart_clock(self) -> None:
        """Leave out of the throughput what was not training: evaluation, checkpoints, start-up."""
        self._interval_start, self._waited, self._interval_steps = time.perf_counter(), 0.0, 0

    def add(self, scalars: dict[str, Tensor], waited: float) -> None:
        """Take in one step's scalars (device tensors, not read here) and the seconds spent waiting for its data."""
        for name, value in scalars.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._interval_steps += 1
        self._waited += waited
        if self._progress is not None:
            self._progress.advance(self._task)

    def write_step(self, step: int, epoch: float, lr: float) -> dict[str, float]:
        """The mean of all scalars since the last call, as one row and one line; returns it on every rank."""
        row = {f"train/{name}": float(total) / self._steps for name, total in self._sums.items()}
        row["train/lr"] = lr
        seconds = time.perf_counter() - self._interval_start
        if self._interval_steps:
            rate = self._interval_steps * self.batch_size / seconds
            wait = self._waited / seconds
            row |= {"time/images_per_second": rate, "time/data_wait": wait}
            eta = (self.total_steps - step) * seconds / self._interval_steps
            if self.active:
                self._say(
                    f"step {step}/{self.total_steps}  epoch {epoch:.2f}  loss {row['train/loss']:.4f}  lr {lr:.3g}"
                    f"  {rate:,.0f} images/s  data wait {wait:.0%}  ETA {_clock(eta)}"
                )
        self._sums, self._steps = {}, 0
        self.restart_clock()
        self.write(step, epoch, row)
        return row

    def write(self, step: int, epoch: float, row: dict[str, float]) -> None:
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, "epoch": round(epoch, 6), **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **row}, step=step)

    def write_scores(self, step: int, epoch: float, scores: dict[str, float]) -> None:
        """Held-out scores, as one row and one line."""
        self.write(step, epoch, scores)
        if self.active and scores:
            shown = "  ".join(f"{name.removeprefix('holdout/')} {value:.4g}" for name, value in scores.items())
            self._say(f"held-out at epoch {epoch:.2f}:  {shown}")

    def say(self, text: str) -> None:
        if self.active:
            self._say(text)

    def state(self) -> dict[str, Tensor]:
        """Sums that a checkpoint between two rows would otherwise lose."""
        return {**self._sums, "::steps": torch.tensor(self._steps)}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._steps = int(tensors["::steps"])
        self._sums = {name: value.to(device) for name, value in tensors.items() if name != "::steps"}

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the std of the L2-normalised features [N, d], times √d: 1 if they fill the sphere
    evenly, 0 if collapsed to a point (Chen & He, arXiv:2011.10566)."""
    unit = F.normalize(features, dim=1)
    return (unit.std(dim=0).mean() * features.shape[1] ** 0.5).item()


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of [N, d] features, each over their sum (RankMe, arXiv:2210.02885)."""
    share = torch.linalg.svdvals(features.double())
    share = share / share.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.exp(-(share * share.clamp_min(1e-300).log()).sum()).item()


def _spread(source: Source | None, count: int) -> Source | None:
    """At most ``count`` images, evenly spaced over the source."""
    if source is None or len(source) <= count:
        return source
    total = len(source)
    return source.select((torch.arange(count) * total) // count)


def _readable_rows(path: Path) -> list[str]:
    """The complete rows of a jsonl file whose last line a kill may have cut short."""
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        rows.append(line if line.endswith("\n") else line + "\n")
    return rows


def _start_wandb(run_dir: Path, recipe: Any) -> Any:
    import wandb

    return wandb.init(project="twinstream", id=run_dir.name, dir=str(run_dir), config=recipe, resume="allow")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
