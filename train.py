"""Pretrain an encoder: ``python train.py RECIPE.yaml [key.sub=value …]``.

The same command again resumes the run. SIGTERM writes a checkpoint and exits with code 75. If another rank or the
network to it is lost, all ranks end with code 69, and the same command goes on from the last checkpoint.
Under torchrun or deepspeed the batch is spread over all ranks.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from trainers.stopping import StopSignal

if __name__ == "__main__":  # the imports below take seconds, in which a signal may come
    StopSignal.installed()

import torch
import typer
import yaml
from torch import nn

from configs.recipe import Recipe, RecipeError, claim_run_dir, load_recipe
from pipelines.choice import build_loader, choose, steady_pixels
from pipelines.sources import DataError, Source, describe, open_source
from trainers.companion.rank import LostPeerError, exit_at_once
from trainers.dropout import dropout_rate
from trainers.encoders import build_encoder
from trainers.engine import Engine, Ranks, joined_ranks, prepare_module
from trainers.failures import TrainingError, known_failures
from trainers.heap import keep_freed_memory
from trainers.methods import Facts, build_method
from trainers.monitors import Monitor
from trainers.optim import build_optimizer, build_schedule
from trainers.pretrain import Run, pretrain
from trainers.runlog import RunLog
from trainers.state import CheckpointError, locked
from trainers.status import end_status, status_of
from trainers.step import compile_embedding
from trainers.watch import before_end, failures_reported, report_failure


def build_run(recipe: Recipe, directory: Path, ranks: Ranks, encoder: nn.Module | None = None) -> Run:
    """All parts of a run, each from its own section of the recipe; an ``encoder`` takes the place of the recipe's."""
    torch.manual_seed(recipe.seed)
    source = open_source(recipe.data, "pretrain")
    counts = describe(recipe.data).counts
    size = recipe.views.size or source.image_size
    name, reason = _agreed_loader(recipe, source, size, ranks)
    loader = build_loader(
        name,
        source,
        recipe.views.resolve(),
        config=recipe.data,
        size=size,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=recipe.engine.accumulation,
    )
    total_steps = recipe.epochs * loader.steps_per_epoch
    facts = Facts(
        image_size=size,
        mean=source.mean,
        std=source.std,
        images=len(source),
        classes=source.num_classes,
        multi_label=source.multi_label,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
        total_steps=total_steps,
        plan=recipe.views.resolve(),
        steady=steady_pixels(name, source, recipe.data),
    )
    method = build_method(recipe.method, encoder or build_encoder(recipe.encoder, size), facts)
    method = prepare_module(method, recipe.engine, ranks)
    if recipe.engine.compile:
        try:
            compile_embedding(method, recipe.engine)
        except ValueError as error:
            raise RecipeError(str(error)) from error
    peak = recipe.optim.scaled_lr(recipe.batch_size)
    schedule = build_schedule(recipe.schedule, peak, loader.steps_per_epoch, total_steps)
    micro_batch_size = recipe.batch_size // (ranks.world_size * recipe.engine.accumulation)
    optimizer = build_optimizer(recipe.optim, method, peak)
    engine = Engine(method, optimizer, recipe.engine, ranks, micro_batch_size, method.view_parts)
    monitor = Monitor(
        recipe.monitor,
        method.encoder,
        open_source(recipe.data, "train") if counts["train"] else None,
        open_source(recipe.data, "holdout") if counts["holdout"] else None,
        size=size,
        batch_size=recipe.batch_size,
        ranks=ranks,
        loading=recipe.data,
    )
    log = RunLog(
        recipe.log,
        directory,
        ranks,
        total_steps=total_steps,
        batch_size=recipe.batch_size,
        recipe=recipe.resolved(),
    )
    log.say(f"{directory}: {source.name}, {len(source):,} images, loader {name}: {reason}")
    torch.manual_seed(recipe.seed + ranks.rank)  # dropout differs between ranks
    export = {
        "arch": recipe.encoder.arch,
        "stem": recipe.encoder.stem,
        "image_size": size,
        "mean": source.mean,
        "std": source.std,
        "dropout": dropout_rate(method.encoder),
    }
    parts = (method, engine, loader, schedule, monitor, log)
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False)
    return Run(directory, recipe.epochs, *parts, recipe.checkpoint, text, export)


def _agreed_loader(recipe: Recipe, source: Source, size: int, ranks: Ranks) -> tuple[str, str]:
    """Rank 0 chooses for all: free memory is not the same on every rank."""
    choice, failure = None, None
    if ranks.is_main:
        try:
            choice = choose(source, recipe.data, size, ranks.device)
        except DataError as error:
            failure = str(error)
    choice, failure = ranks.from_main((choice, failure))
    if choice is None:
        raise DataError(failure)
    return choice


REFUSALS = (RecipeError, DataError, CheckpointError)  # input that the user can mend: one line and exit code 2
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="The deepspeed launcher's.")] = 0,
) -> None:
    """Pretrain an encoder by a recipe; the same command again resumes the run."""
    try:
        recipe = load_recipe(recipe_path, overrides or [])
        directory = recipe.run_dir(recipe_path.stem)
        with joined_ranks(recipe.engine, REFUSALS) as ranks, ExitStack() as held:
            # Rank 0 alone downloads and claims; what it cannot do, all ranks report alike.
            failure, remark = ranks.from_main(_begin(recipe, directory, held) if ranks.is_main else (None, None))
            if failure is not None:  # all ranks know it, and leave together
                if ranks.is_main:
                    print(f"error: {failure}", file=sys.stderr)
                raise typer.Exit(2)
            held.enter_context(status_of(directory, ranks.is_main, REFUSALS))
            if ranks.is_main:
                before_end(lambda cause, code: end_status(directory, code, cause))
            keep_freed_memory(recipe.engine, ranks.device)
            held.enter_context(failures_reported(REFUSALS))  # inside status_of: what was lost is told from what failed
            run = build_run(recipe, directory, ranks)
            if remark is not None:
                run.log.say(remark)
            with known_failures(run):
                code = pretrain(run)
            if ranks.is_main:
                end_status(directory, code)
    except REFUSALS as error:
        report_failure(str(error), 2)
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except LostPeerError as error:
        if not error.printed:
            print(f"error: {error}", file=sys.stderr)
        exit_at_once(error.code)
    raise typer.Exit(code)


def _begin(recipe: Recipe, directory: Path, held: ExitStack) -> tuple[str | None, str | None]:
    """Rank 0's part of the start: (what is wrong, a remark for the user). ``held`` keeps the folder's lock."""
    try:
        open_source(recipe.data, "pretrain")
        held.enter_context(locked(directory))
        return None, claim_run_dir(directory, recipe)
    except REFUSALS as error:
        return str(error), None


if __name__ == "__main__":
    app()
