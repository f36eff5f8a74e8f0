"""Ours against the plain loop on a CPU, from data to table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.end_to_end_contenders import cpu_seconds
from benchmarks.speedrun.clock import Clock
from benchmarks.speedrun.compare import KINDS, Runner, at_equal_accuracy, encoder_at, take_turns
from benchmarks.speedrun.data import Data
from benchmarks.speedrun.evaluation import scores
from benchmarks.speedrun.plain import LR, PlainLoop
from benchmarks.speedrun.recipe import Recipe
from benchmarks.speedrun.timed import Budget, describe
from benchmarks.speedrun.trainer import Trainer

PLAIN_BATCH = 128


def compare(
    data: Data, recipe: Recipe, options: argparse.Namespace, budget: Budget, report: Callable[[str], None]
) -> dict[str, Any]:
    device = torch.device("cpu")
    mine = Trainer(data, recipe, device)
    mine.prepare()
    mine.reset(options.seed)
    batch = min(PLAIN_BATCH, len(data.train))
    theirs = PlainLoop(
        data, recipe.arch, epochs=options.plain_epochs, batch=batch, workers=options.workers, seed=options.seed
    )
    ours, plain = (Runner(contender, Clock(), Clock(cpu_seconds)) for contender in (mine, theirs))
    checking = Clock()
    with checking.running():
        untrained = scores(mine.encoder, data, device, test=False)
    report("before training: " + describe({"epoch": 0, "seconds": 0, "loss": 0, **untrained}))
    # What is left to do in the end: the test split, for two encoders of each.
    reserve = 4 * checking.seconds * (1 + len(data.test) / (len(data.train) + len(data.holdout)))
    runners = {"ours": ours, "plain": plain}
    take_turns(
        runners,
        lambda encoder: scores(encoder, data, device, test=False),
        lambda name, check: report(f"{name:5s} {describe(check)}"),
        lambda: budget.left < reserve,
    )
    rows = [at_equal_accuracy(ours, plain, kind) for kind in KINDS]
    tested: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        row["above_untrained"] = row["target"] > untrained[f"held_{row['score']}"]
        for name, runner in runners.items():
            if (check := row[name]) is not None:
                key = name, check["epoch"]
                tested[key] = tested.get(key) or scores(encoder_at(runner, check), data, device)
                row[name] = check | {"test": tested[key][row["score"]]}
        report(_told(row))
    settings = {
        "optimizer": "adam",
        "lr": LR,
        "batch": batch,
        "epochs": options.plain_epochs,
        "workers": options.workers,
    }
    return {
        "mode": "cpu",
        "recipe": asdict(recipe),
        "plain": settings,
        "untrained": untrained,
        "stopped": not all(runner.contender.done for runner in runners.values()),
        "rows": rows,
        "curves": {name: runner.curve for name, runner in runners.items()},
    }


def _told(row: dict[str, Any]) -> str:
    if row["ours"] is None:
        return f"{row['score']}: ours did not reach the plain loop's {row['target']:.1f}"
    parts = [f"{row['score']} {row['target']:.1f} on the held-out images"]
    parts += [
        f"{name} {row[name]['seconds']:.1f} s, {row[name]['cpu_seconds']:.1f} CPU-s, test {row[name]['test']:.1f}"
        for name in ("ours", "plain")
    ]
    doubt = "" if row["above_untrained"] else " (no more than the untrained encoder has: this compares nothing)"
    return ": ".join([parts[0], "; ".join(parts[1:])]) + f"; plain / ours {row['ratio_seconds']:.2f}{doubt}"
