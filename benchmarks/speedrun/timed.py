"""The GPU mode: seconds of training until a score on the test split is reached, and what each trick is worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.speedrun.clock import Clock, reached
from benchmarks.speedrun.data import Data
from benchmarks.speedrun.evaluation import scores
from benchmarks.speedrun.recipe import ABLATIONS, Recipe
from benchmarks.speedrun.trainer import Trainer

TARGETS = (("linear", 83.0), ("knn", 90.0), ("linear", 90.0))
_SPARE = 1.1  # of an estimate: the evaluation beside the training
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """When all has to be over."""

    end: float  # time.monotonic()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def timed_runs(
    data: Data,
    recipe: Recipe,
    device: torch.device,
    seeds: Iterable[int],
    checks: int,
    budget: Budget,
    report: Report,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
    later: Sequence[Recipe] = (),
) -> dict[str, Any]:
    """A run a seed. Compiling, tuning and capturing come first and are timed apart, as evaluation is.

    ``save`` is given what is known after each seed. ``later``: recipes that are to be run in the same budget.

    If the recipe's epochs do not fit into its share of what is left once it is prepared, there are fewer of them, and
    the schedule is that of as many.
    """
    trainer, told = _prepared(data, recipe, device)
    scores(trainer.encoder, data, device)  # compiles and tunes
    evaluation = Clock(device=device)
    with evaluation.running():
        scores(trainer.encoder, data, device)
    epoch = trainer.seconds_of_an_epoch(Clock(device=device))
    seeds = list(seeds)
    checking = (checks + 1) * evaluation.seconds
    wanted, *others = (one.epochs * epoch + checking for one in (recipe, *later))
    left = budget.left - len(later) * told["prepare_seconds"]
    share = max(0.0, left * wanted / (wanted + sum(others)))
    budget = Budget(time.monotonic() + share)
    room = share / len(seeds) / _SPARE - checking
    trainer.epochs = max(1, min(recipe.epochs, int(room / epoch)))
    report(
        f"prepared in {told['prepare_seconds']:.0f} s; about {epoch:.2f} s an epoch, {trainer.epochs} of"
        f" {recipe.epochs} epochs fit; a check takes {evaluation.seconds:.1f} s"
    )
    runs: list[dict[str, Any]] = []
    whole = told | {"recipe": asdict(recipe), "epochs": trainer.epochs, "runs": runs}
    for seed in seeds:
        trainer.reset(seed)
        curve, seconds = _run(trainer, data, device, checks, budget, report, test=True)
        found = {_name(target): _seconds(reached(curve, *target)) for target in TARGETS}
        runs.append(
            {"seed": seed, "stopped": not trainer.done, "evaluation_seconds": seconds, "reached": found, "curve": curve}
        )
        save(whole | {"summary": summary(runs)})
    return whole | {"summary": summary(runs)}


def ablate(
    data: Data, recipe: Recipe, device: torch.device, names: Sequence[str], seed: int, budget: Budget, report: Report
) -> list[dict[str, Any]]:
    """The recipe, then the recipe with one trick off at a time, scored on the held-out images only."""
    rows: list[dict[str, Any]] = []
    for name, change in {"all tricks": {}, **{name: ABLATIONS[name] for name in names}}.items():
        if budget.left <= 0:
            rows.append({"name": name, "missing": "no time left"})
            continue
        trainer, told = _prepared(data, replace(recipe, **change), device)
        trainer.reset(seed)
        curve, _ = _run(trainer, data, device, 1, budget, lambda line: None, test=False)
        row: dict[str, Any] = {"name": name, "change": change, "stopped": not trainer.done, **told, **curve[-1]}
        first = rows[0] if rows else row
        effect = {key: row[key] - first[key] for key in ("seconds", "held_knn", "held_linear")}
        rows.append(row | {"effect": effect})
        report(
            f"{name:20s} {row['seconds']:8.2f} s ({effect['seconds']:+8.2f})   kNN {row['held_knn']:6.2f}"
            f" ({effect['held_knn']:+6.2f})   linear {row['held_linear']:6.2f} ({effect['held_linear']:+6.2f})"
        )
    return rows


def _prepared(data: Data, recipe: Recipe, device: torch.device) -> tuple[Trainer, dict[str, Any]]:
    torch.compiler.reset()  # all trainers share their code, and PyTorch compiles that only so many times
    clock = Clock(device=device)
    with clock.running():
        trainer = Trainer(data, recipe, device)
        trainer.prepare()
    return trainer, {"prepare_seconds": clock.seconds}


def _run(
    trainer: Trainer, data: Data, device: torch.device, checks: int, budget: Budget, report: Report, *, test: bool
) -> tuple[list[dict[str, float]], float]:
    """The curve, and the seconds that its checks took."""
    clock, evaluation = Clock(device=device), Clock(device=device)
    curve: list[dict[str, float]] = []
    every = -(-trainer.epochs // checks)  # never more checks than were reckoned with
    for epoch in range(1, trainer.epochs + 1):
        with clock.running():
            loss = trainer.epoch()
        last = trainer.done or budget.left <= 0
        if epoch % every == 0 or last:
            with evaluation.running():
                found = scores(trainer.encoder, data, device, test=test)
            curve.append({"epoch": epoch, "seconds": clock.seconds, "loss": loss, **found})
            report(describe(curve[-1]))
        if last:
            break
    return curve, evaluation.seconds


def describe(check: dict[str, float]) -> str:
    parts = [f"epoch {int(check['epoch']):4d} {check['seconds']:8.2f} s  loss {check['loss']:7.4f}"]
    parts += [f"{name} {check[name]:5.2f}" for name in ("held_knn", "held_linear", "knn", "linear") if name in check]
    return "  ".join(parts)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By target, over the seeds that reached it: mean and standard deviation of the seconds."""
    result = {}
    for target in map(_name, TARGETS):
        found = [run["reached"][target] for run in runs if run["reached"][target] is not None]
        result[target] = {
            "seeds": len(runs),
            "reached": len(found),
            "mean_seconds": statistics.mean(found) if found else None,
            "sd_seconds": statistics.stdev(found) if len(found) > 1 else None,
        }
    return result


def _name(target: tuple[str, float]) -> str:
    return f"{target[0]} {target[1]:g}"


def _seconds(check: dict[str, float] | None) -> float | None:
    return None if check is None else check["seconds"]
