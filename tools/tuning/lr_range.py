"""The learning rate range test (Smith, arXiv:1506.01186): the loss while the learning rate grows from step to step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.recipe import Recipe
from tools.tuning.batch_size import TuneError, endless
from train import build_run
from trainers.engine import joined_ranks
from trainers.memory import is_out_of_memory
from trainers.step import train_step

# Six decades around what the optimizers are used with; of the steps themselves, lr_scaling included.
RANGES = {"lars": (1e-3, 1e3), "sgd": (1e-4, 100.0), "adam": (1e-6, 1.0), "adamw": (1e-6, 1.0)}
SMOOTHING = 0.9  # of the exponential mean of losses: about the last ten count
DIVERGED = 4  # times the best smoothed loss


@dataclass(frozen=True, slots=True)
class Curve:
    lrs: list[float]  # of each step
    losses: list[float]
    smoothed: list[float]
    ended: str  # why there are no more steps

    @property
    def minimum(self) -> float:
        """The learning rate at which the smoothed loss was lowest."""
        return self.lrs[int(np.argmin(self.smoothed))]

    @property
    def suggestion(self) -> float | None:
        """Where the smoothed loss falls most steeply in log lr, on its way to its minimum; None: it never falls.

        The first tenth, where the mean is one of few losses, and the last step are left out.
        """
        first = max(1, len(self.lrs) // 10)
        last = min(int(np.argmin(self.smoothed)) + 1, len(self.lrs) - 1)
        if last - first < 1 or len(self.lrs) < 3:
            return None
        slope = np.gradient(self.smoothed, np.log(self.lrs))[first:last]
        return self.lrs[first + int(np.argmin(slope))] if slope.min() < 0 else None


def sweep(step: Callable[[float], float], lowest: float, highest: float, steps: int) -> Curve:
    """Call ``step(lr) -> loss`` with ``steps`` learning rates in equal ratios, until the loss diverges.

    Diverged: the smoothed loss is above 4 times its best (where that is below zero: above it by 3 times its
    size, or the first loss's if that is larger), or a loss is not finite.
    """
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    for number in range(steps):
        lr = lowest * (highest / lowest) ** (number / (steps - 1))
        loss = step(lr)
        if not math.isfinite(loss):
            return Curve(lrs, losses, smoothed, f"the loss was {loss} at {lr:.3g}")
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        lrs.append(lr)
        losses.append(loss)
        smoothed.append(mean / (1 - SMOOTHING ** (number + 1)))
        best = min(smoothed)
        allowed = DIVERGED * best if best > 0 else best + (DIVERGED - 1) * max(abs(smoothed[0]), abs(best))
        if smoothed[-1] > allowed:
            return Curve(lrs, losses, smoothed, f"the smoothed loss was above {DIVERGED} times its best at {lr:.3g}")
    return Curve(lrs, losses, smoothed, f"all {steps} steps were made")


def sweep_recipe(
    recipe: Recipe, path: Path, lowest: float, highest: float, steps: int, advanced: Callable[[], None]
) -> Curve:
    """The sweep on a recipe's own batches, optimizer and engine, in place of its schedule; the weights are dropped.

    Raises:
        TuneError: the steps do not fit into memory.
    """
    with joined_ranks(recipe.engine) as alone:
        run = build_run(recipe, path, alone)
        run.method.train()
        with closing(endless(run.loader)) as batches:

            def step(lr: float) -> float:
                result = train_step(run.engine, run.method, next(batches), lr)
                advanced()
                return result.scalars["loss"].item()

            try:
                return sweep(step, lowest, highest, steps)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise TuneError(
                    f"batch_size={recipe.batch_size} does not fit into memory; find one that does (--batch-size), or"
                    " raise engine.accumulation"
                ) from error
            finally:
                run.loader.close()


def save_curve(curve: Curve, picture: Path, title: str, facts: dict[str, Any], scale: float) -> None:
    """``picture`` (a PNG), and the numbers beside it as JSON. ``scale``: learning rate of a step over ``optim.lr``."""
    suggestion = curve.suggestion
    values = facts | {
        "suggestion": suggestion,
        "optim_lr": None if suggestion is None else suggestion / scale,
        "minimum": curve.minimum,
        "minimum_tenth": curve.minimum / 10,
        "ended": curve.ended,
        "smoothing": SMOOTHING,
        "lr": curve.lrs,
        "loss": curve.losses,
        "smoothed": curve.smoothed,
    }
    picture.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    _draw(curve, picture, title, scale)


def _draw(curve: Curve, picture: Path, title: str, scale: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.lrs, curve.losses, color="0.75", linewidth=1, label="loss of each step")
    axes.plot(curve.lrs, curve.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    marks = [
        (curve.suggestion, "tab:red", "-", "steepest descent"),
        (curve.minimum / 10, "tab:green", "--", "minimum / 10"),
    ]
    for lr, colour, style, name in marks:
        if lr is not None:
            axes.axvline(lr, color=colour, linestyle=style, label=f"{name}: {lr:.3g} (optim.lr={lr / scale:.3g})")
            height = np.interp(math.log(lr), np.log(curve.lrs), curve.smoothed, left=np.nan)
            axes.plot(lr, height, "o", color=colour)
    # A loss that diverges would flatten all that is of interest.
    low, high = min(curve.smoothed), max(curve.smoothed[: int(np.argmin(curve.smoothed)) + 1])
    room = 0.4 * (high - low) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of a step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=9, loc="lower left")  # a curve that falls is elsewhere
    figure.savefig(picture)
