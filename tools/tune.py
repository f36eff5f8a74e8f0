"""Finds the largest batch that fits into memory, and a learning rate, for a recipe and the machine it runs on.

    python -m tools.tune configs/cifar10/simclr.yaml --batch-size --lr
    python -m tools.tune configs/imagenet/resnet50_100ep.yaml --batch-size --ranks 8
    python -m tools.tune configs/quickstart.yaml optim.name=adamw --lr --output runs/adamw.yaml

What is found goes into RECIPE-tuned.yaml, which extends RECIPE. --batch-size makes a few real steps with each batch, in
a process of its own. --lr is the range test of Smith (arXiv:1506.01186): its curve is saved beside the recipe as a
picture and as JSON. No run is touched. The exit code is 0, or 2 where nothing could be found.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from configs.recipe import Recipe, RecipeError, load_recipe
from pipelines.order import count_steps
from pipelines.sources import DataError, open_source
from tools.tuning.batch_size import Tries, TuneError, largest_batch, load_for
from tools.tuning.lr_range import RANGES, Curve, save_curve, sweep_recipe
from tools.tuning.writing import where_to_write, write_recipe

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_FOR = {"batch_size": ("memory", "margin", "multiple", "ranks"), "lr": ("lr_min", "lr_max", "steps")}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=120)  # a log


@app.command()
def main(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value")] = None,
    batch_size: Annotated[bool, typer.Option("--batch-size", help="Find the largest batch that fits.")] = False,
    lr: Annotated[
        bool, typer.Option("--lr", help="Find a learning rate, at that batch if both are asked for.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="What a process may take, such as 8GB; what is free, unless given.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the memory that is left free.")] = 0.1,
    multiple: Annotated[int, typer.Option(min=1, help="Of which each micro-batch is to be one.")] = 8,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run; each takes its share of the batch.")] = 1,
    lr_min: Annotated[float | None, typer.Option(help="Of the first step; by the optimizer, unless given.")] = None,
    lr_max: Annotated[float | None, typer.Option(help="Of the last step; by the optimizer, unless given.")] = None,
    steps: Annotated[int, typer.Option(min=20, max=100_000, help="Of the range test.")] = 100,
    output: Annotated[Path | None, typer.Option(help="The recipe to write; RECIPE-tuned.yaml unless given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Find the largest batch that fits, a learning rate, or both, and write a recipe that has them."""
    changes = list(overrides or [])
    try:
        asked = {"batch_size": batch_size, "lr": lr}
        _check(asked, {name for name in context.params if _given(context, name)})
        allowed = None if memory is None else _bytes(memory)
        if lr and ranks > 1:
            raise RecipeError(f"--ranks {ranks} is for --batch-size; --lr needs the whole batch in this process")
        recipe = load_recipe(path, changes)
        _range(recipe, lr_min, lr_max)
        written, *pictures = where_to_write(path, output, ("-lr.png", "-lr.json") if lr else (), force=force)
        images = len(open_source(recipe.data, "pretrain"))  # downloaded now, if it has to be
        found: dict[str, Any] = {}
        comments = [f"Written by python -m tools.tune {shlex.join([str(path), *changes])}"]
        if batch_size:
            tries = Tries(path, changes, ranks=ranks, memory=allowed, margin=margin)
            found["batch_size"], comment = _find_batch(recipe, images, tries, multiple)
            comments.append(comment)
            recipe = load_for(path, changes, found["batch_size"], ranks)
        if lr:
            found["optim.lr"], comment = _find_lr(recipe, path, _range(recipe, lr_min, lr_max), steps, pictures[0])
            comments.append(comment)
        write_recipe(written, path, changes, found, comments)
    except (RecipeError, DataError, TuneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped; no recipe was written", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(f"{written}: " + ", ".join(f"{key}={value}" for key, value in found.items()))


def _find_batch(recipe: Recipe, images: int, tries: Tries, multiple: int) -> tuple[int, str]:
    """The batch, and how it was found."""
    parts = tries.ranks * recipe.engine.accumulation
    unit = parts * multiple if parts * multiple <= images else parts

    def fits(batch: int) -> bool:
        with console.status(f"trying batch_size={batch}"):
            return tries.fits(batch)

    batch = largest_batch(fits, start=recipe.batch_size, unit=unit, limit=images)
    budget = f"{tries.budget / 1e9:.3g} GB" if tries.budget else "memory"
    if tries.budget and tries.memory:
        budget += f" ({tries.memory / 1e9:.3g} GB less {tries.margin:.0%})"
    where = f"{tries.device or 'nothing was run'}, {budget}" + (
        f", one of {tries.ranks} ranks" if tries.ranks > 1 else ""
    )
    console.print(_table(tries, where), soft_wrap=False)
    if not batch:
        least = min(tries.tried, key=lambda one: one.batch_size)
        if least.peak is None and least.outcome != "out of memory":
            raise TuneError(f"batch_size={least.batch_size}: {least.outcome}")
        raise TuneError(
            f"not even batch_size={least.batch_size} fits ({least.outcome}); raise engine.accumulation or --memory, or"
            " make views or encoder smaller"
        )
    best = next(one for one in tries.tried if one.batch_size == batch)
    epoch = count_steps(images, batch, recipe.data.last)
    console.print(f"batch_size={batch}: steps in an epoch of {images:,} images: {epoch:,}")
    before, after = recipe.optim.scaled_lr(recipe.batch_size), recipe.optim.scaled_lr(batch)
    if batch != recipe.batch_size:
        rule = (
            f"optim.lr_scaling={recipe.optim.lr_scaling}: the peak learning rate goes from {before:.3g} to {after:.3g}"
        )
        if recipe.optim.lr_scaling == "none":
            rule = f"optim.lr_scaling=none: the peak learning rate stays {before:.3g}; --lr looks for another"
        console.print(rule)
    all_there = ", all the training images there are" if batch + unit > images else ""
    return batch, (
        f"batch_size: the largest multiple of {unit} that fits{all_there}; it takes {_known(best.peak) / 1e9:.3g} GB of"
        f" {budget} on {tries.device}" + (f", on each of {tries.ranks} ranks" if tries.ranks > 1 else "") + "."
    )


def _find_lr(recipe: Recipe, path: Path, bounds: tuple[float, float], steps: int, picture: Path) -> tuple[float, str]:
    """``optim.lr``, and how it was found."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sweeping the learning rate", total=steps)
        curve = sweep_recipe(recipe, path, *bounds, steps, lambda: bar.advance(task))
    if not curve.lrs:
        raise TuneError(f"{curve.ended}, in the first step; see whether train.py runs the recipe")
    optim, batch = recipe.optim, recipe.batch_size
    scale = optim.scaled_lr(batch) / optim.lr
    facts = {"recipe": str(path), "batch_size": batch, "optimizer": optim.name, "lr_scaling": optim.lr_scaling}
    save_curve(curve, picture, f"{path.name}: {recipe.method.name}, {optim.name}, batch_size={batch}", facts, scale)
    console.print(f"{curve.ended}; the curve is in {picture} and {picture.with_suffix('.json').name}")
    suggestion = curve.suggestion
    if suggestion is None:
        raise TuneError(
            f"the loss did not fall between {curve.lrs[0]:.3g} and {curve.lrs[-1]:.3g}: see {picture}; give another"
            " --lr-min or --lr-max, or more --steps"
        )
    _remark(curve)
    value = float(f"{suggestion / scale:.3g}")
    sides = f"the peak learning rate is {suggestion:.3g} at batch_size={batch}"
    rule = "" if optim.lr_scaling == "none" else f", and optim.lr={value} by optim.lr_scaling={optim.lr_scaling}"
    console.print(f"steepest descent: {sides}{rule}; a tenth of the minimum's is {curve.minimum / 10:.3g}")
    return value, (
        f"optim.lr: where the loss fell most steeply in {len(curve.lrs)} steps from {bounds[0]:g} towards {bounds[1]:g}"
        f" ({picture.name}); {sides}, by optim.lr_scaling={optim.lr_scaling}."
    )


def _remark(curve: Curve) -> None:
    if curve.minimum == curve.lrs[-1]:
        console.print(f"the loss was still falling at {curve.lrs[-1]:.3g}; a higher --lr-max may find more")


def _table(tries: Tries, title: str) -> Table:
    table = Table(title=title)
    table.add_column("batch_size", justify="right")
    table.add_column("peak GB", justify="right")
    table.add_column("images/s", justify="right")
    table.add_column("")
    for one in sorted(tries.tried, key=lambda one: one.batch_size):
        peak = "" if one.peak is None else f"{one.peak / 1e9:.3g}"
        table.add_row(f"{one.batch_size:,}", peak, f"{one.rate:,.0f}" if one.rate else "", one.outcome)
    return table


def _check(asked: dict[str, bool], given: set[str]) -> None:
    if not any(asked.values()):
        raise RecipeError("say what to look for: --batch-size, --lr, or both")
    for what, options in _FOR.items():
        for option in options:
            if option in given and not asked[what]:
                raise RecipeError(f"{_flag(option)} is for {_flag(what)}, which was not asked for")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("tools.tune is one process; start it without torchrun or deepspeed (--ranks says how many)")


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _range(recipe: Recipe, lowest: float | None, highest: float | None) -> tuple[float, float]:
    usual = RANGES[recipe.optim.name]
    bounds = usual[0] if lowest is None else lowest, usual[1] if highest is None else highest
    if not 0 < bounds[0] < bounds[1] < float("inf"):
        raise RecipeError(f"--lr-min {bounds[0]:g} --lr-max {bounds[1]:g}: expected 0 < --lr-min < --lr-max")
    return bounds


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise RecipeError(f"--memory {text!r}: expected a size such as 8GB, 7.5GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _known(peak: int | None) -> int:
    assert peak is not None
    return peak


if __name__ == "__main__":
    app()
