"""Where a run is written: ``metrics.jsonl``, TensorBoard, the terminal, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipelines.config import Section
from pipelines.foreign import check_regular, load_json
from trainers.engine import Ranks
from trainers.state import CheckpointError

_SKIPPED = "skipped_steps::total"
_MOST_UNREAD = 1024  # steps

_MOST_ROW = 1 << 20  # letters


class LogConfig(Section):
    every_steps: int = Field(10, ge=1)
    wandb: bool = False


class RunLog:
    """Keeps scalars on the device and writes their means, every so many steps, to all that listen.

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
        self._unread: list[tuple[tuple[str, ...], Tensor]] = []  # of each step: names, and values on the device
        self._sums: dict[str, float] = {}  # of what has been read
        self._counts: dict[str, int] = {}  # of the steps in each sum: some scalars are not known in all
        self.steps_done = 0  # by this process
        self.skipped_steps: int | None = None  # since the run began; None: none are ever skipped
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
        else:
            rows = None
        try:
            if rows is not None:
                draft = self._path.with_suffix(".tmp")
                draft.write_text("".join(rows))
                draft.replace(self._path)
            self._file = self._path.open("ab", buffering=0)
            board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise CheckpointError(f"the log in {self._run_dir} cannot be written: {error}") from error
        self._unwritten = b""
        self._board: SummaryWriter | None = board
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

    def has_scores(self, step: int) -> bool:
        """Whether the held-out scores of that step are written."""
        rows = _readable_rows(self._path) if self._path.exists() else []
        return any(row["step"] == step and any(k.startswith("holdout/") for k in row) for row in map(json.loads, rows))

    def close(self) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._append(b"")
        self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def restart_clock(self) -> None:
        """Leave out of the throughput what was not training: evaluation, checkpoints, start-up."""
        self._interval_start, self._waited, self._interval_steps = time.perf_counter(), 0.0, 0

    def add(self, scalars: dict[str, Tensor], waited: float) -> None:
        """Take in one step's scalars (device tensors, not read here) and the seconds spent waiting for its data.

        NaN means that a scalar is not known in this step, and counts for nothing; but not if it is the loss.
        """
        if scalars:
            # One launch a step. All else is done when they are read.
            self._unread.append((tuple(scalars), torch.stack([value.detach() for value in scalars.values()])))
        if len(self._unread) >= _MOST_UNREAD:
            self._read()
        self.steps_done += 1
        self._interval_steps += 1
        self._waited += waited
        if self._progress is not None:
            self._progress.advance(self._task)

    def write_step(self, step: int, epoch: float, lr: float) -> dict[str, float]:
        """The mean of all scalars since the last call, as one row and one line; returns it on every rank."""
        self._read()
        row = {f"train/{name}": self._sums[name] / count for name, count in self._counts.items() if count}
        row["train/lr"] = lr
        if self.skipped_steps is not None:
            row["train/skipped_steps"] = self.skipped_steps
        seconds = time.perf_counter() - self._interval_start
        if self._interval_steps:
            rate = self._interval_steps * self.batch_size / seconds
            wait = self._waited / seconds
            row |= {"time/images_per_second": rate, "time/data_wait": wait}
            eta = (self.total_steps - step) * seconds / self._interval_steps
            if self.active:
                loss = f"{row['train/loss']:.4f}" if "train/loss" in row else "none, all steps were skipped"
                self._say(
                    f"step {step}/{self.total_steps}  epoch {epoch:.2f}  loss {loss}  lr {lr:.3g}"
                    f"  {rate:,.0f} images/s  data wait {wait:.0%}  ETA {_clock(eta)}"
                )
        self._sums, self._counts = {}, {}
        self.restart_clock()
        self.write(step, epoch, row)
        return row

    def write(self, step: int, epoch: float, row: dict[str, float]) -> None:
        if not self.active:
            return
        self._append((json.dumps({"step": step, "epoch": round(epoch, 6), **row}) + "\n").encode())
        self._show(step, row)
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **row}, step=step)

    def _append(self, row: bytes) -> None:
        """What a full disk does not take is kept until it does: the run goes on, and no row is lost."""
        self._unwritten += row
        with suppress(OSError):
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _show(self, step: int, row: dict[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            self._board = None
            self._say(f"warning: TensorBoard's file cannot be written ({error}); it ends here, metrics.jsonl goes on")

    def write_scores(self, step: int, epoch: float, scores: dict[str, float]) -> None:
        """Held-out scores, as one row and one line."""
        self.write(step, epoch, scores)
        if self.active:
            shown = "  ".join(f"{name.removeprefix('holdout/')} {value:.4g}" for name, value in scores.items())
            self._say(f"held-out at epoch {epoch:.2f}:  {shown}")

    def say(self, text: str) -> None:
        if self.active:
            self._say(text)

    def state(self) -> dict[str, Tensor]:
        """Sums that a checkpoint between two rows would otherwise lose, and the count of skipped steps."""
        self._read()
        state = {name: torch.tensor(total, dtype=torch.float64) for name, total in self._sums.items()}
        state |= {f"{name}::steps": torch.tensor(count) for name, count in self._counts.items()}
        return state | ({} if self.skipped_steps is None else {_SKIPPED: torch.tensor(self.skipped_steps)})

    def load(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        if (skipped := tensors.pop(_SKIPPED, None)) is not None:
            self.skipped_steps = int(skipped)
        self._sums = {name: float(value) for name, value in tensors.items() if not name.endswith("::steps")}
        self._counts = {name: int(tensors[f"{name}::steps"]) for name in self._sums}

    def _read(self) -> None:
        """Wait for the device and add up what it has, step by step: a sum must not depend on when it was saved."""
        for names, rows in groupby(self._unread, key=itemgetter(0)):
            for values in torch.stack([values for _, values in rows]).tolist():
                for name, value in zip(names, values, strict=True):
                    known = name == "loss" or not math.isnan(value)
                    self._sums[name] = self._sums.get(name, 0.0) + (value if known else 0.0)
                    self._counts[name] = self._counts.get(name, 0) + known
        self._unread = []

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def _readable_rows(path: Path) -> list[str]:
    """The complete rows of a jsonl file whose last line a kill may have cut short."""
    rows = []
    try:
        check_regular(path)
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(_MOST_ROW):
                try:
                    row = load_json(line)
                except ValueError:
                    break
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    break
                rows.append(line if line.endswith("\n") else line + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return rows


def _start_wandb(run_dir: Path, recipe: Any) -> Any:
    import wandb

    return wandb.init(project="twinstream", id=run_dir.name, dir=str(run_dir), config=recipe, resume="allow")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
