"""Says what bounds the throughput of a recipe on this machine, and what to change.

    python -m tools.profile configs/quickstart.yaml
    python -m tools.profile configs/imagenet/resnet50_100ep.yaml --compile --trace
    torchrun --standalone --nproc_per_node=8 -m tools.profile configs/imagenet/resnet50_100ep.yaml

Runs the parts of the run alone (reading, decoding, photometry, loader, encoder, heads, loss, optimizer, communication)
and together, each against the limit that the device's own copy and matrix product, measured first, set for it. What is
found goes to the terminal and, as profile.json and waterfall.png, to runs/profile-RECIPE. No run is touched.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from configs.recipe import Recipe, RecipeError, load_recipe
from pipelines.sources import DataError, open_source
from tools.profiling.measure import Profile, Stage, profile_run
from tools.profiling.picture import draw
from tools.profiling.stub import StubEncoder
from tools.profiling.verdict import verdict
from tools.tuning.batch_size import endless
from train import build_run
from trainers.engine import joined_ranks
from trainers.heap import keep_freed_memory
from trainers.memory import is_out_of_memory
from trainers.pretrain import Run
from trainers.step import train_step

TRACED = 3  # steps of a trace, after as many that are not

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=120)  # a log


@app.command()
def main(
    path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value")] = None,
    seconds: Annotated[float, typer.Option(min=0, max=600, help="For each part; three calls at least.")] = 2.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Try torch.compile on the encoder: minutes.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also write three steps as a trace for a browser.")] = False,
    stub: Annotated[bool, typer.Option("--stub", help="One layer for an encoder: what could the rest feed?")] = False,
    output: Annotated[Path | None, typer.Option(help="The folder; runs/profile-RECIPE unless given.")] = None,
) -> None:
    """Measure the parts of a run and all of them together; say what bounds it and what to change."""
    folder = output or Path("runs") / f"profile-{path.stem}"
    try:
        recipe = load_recipe(path, overrides or [])
        with joined_ranks(recipe.engine) as ranks:
            if ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
            keep_freed_memory(recipe.engine, ranks.device)
            with tempfile.TemporaryDirectory() as nowhere:
                run = build_run(recipe, Path(nowhere), ranks, _stub(recipe) if stub else None)
                with closing(run.loader):
                    found = _measured(run, recipe, seconds, compiled)
                    if trace:
                        _trace(run, folder / f"trace-rank{ranks.rank}.json")
            if ranks.is_main:
                _show(found, recipe, f"{path.name}{', stub encoder' if stub else ''}", folder)
    except (RecipeError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _measured(run: Run, recipe: Recipe, seconds: float, compiled: bool) -> Profile:
    try:
        with console.status("") as status:
            say = lambda what: status.update(f"measuring {what}")  # noqa: E731
            return profile_run(run, recipe, seconds=seconds, compiled=compiled, say=say)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecipeError(
            f"batch_size={recipe.batch_size} does not fit into memory; python -m tools.tune RECIPE --batch-size finds"
            " one that does"
        ) from error


def _stub(recipe: Recipe) -> StubEncoder:
    size = recipe.views.size or open_source(recipe.data, "pretrain").image_size
    return StubEncoder(size)


def _show(profile: Profile, recipe: Recipe, name: str, folder: Path) -> None:
    lines = verdict(profile, recipe)
    console.print(_table(profile, name), soft_wrap=False)
    for line in lines:
        console.print(f"- {line}")
    found = profile.as_json() | {
        "recipe": recipe.resolved(),
        "shares": profile.shares,
        "bottleneck": profile.bottleneck,
        "verdict": lines,
    }
    (folder / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    title = f"{name}: {profile.rate(profile.whole_seconds):,.0f} images/s, {lines[0]}"
    draw(profile, folder / "waterfall.png", title)
    console.print(f"{folder}/waterfall.png, profile.json")


def _table(profile: Profile, name: str) -> Table:
    facts, limits = profile.facts, profile.limits
    ranks = f", {facts['ranks']} ranks" if facts["ranks"] > 1 else f", {facts['threads']} threads"
    table = Table(
        title=f"{name} on {facts['device']}{ranks}: a step of {profile.batch_size:,} images, loader"
        f" {profile.loader}; copy {limits.copy / 1e9:,.3g} GB/s, matrix product {limits.matmul / 1e9:,.3g} GFLOP/s"
        f" ({limits.precision})"
    )
    for heading in ("", "ms a step", "images/s", "share", "of its limit"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_column("the limit")
    share = profile.shares
    for stage in profile.data:
        table.add_row(*_cells(profile, stage, f"{stage.name} alone", ""))
    table.add_section()
    for stage in profile.step:
        table.add_row(*_cells(profile, stage, stage.name, f"{share[stage.name]:.1%}"))
    table.add_section()
    step = Stage("step", profile.step_seconds)
    table.add_row(
        *_cells(profile, step, "step on resident data", f"{profile.step_seconds / profile.whole_seconds:.0%}")
    )
    whole = Stage("all", profile.whole_seconds)
    waited = f"{profile.waiting:.0%} of it waiting for the next batch"
    table.add_row(*_cells(profile, whole, "all, with the loader", "100%")[:-1], waited)
    return table


def _cells(profile: Profile, stage: Stage, name: str, share: str) -> list[str]:
    rate = f"{profile.rate(stage.seconds):,.0f}" if stage.seconds else ""
    reached = "" if stage.reached is None else f"{stage.reached:.0%}"
    return [name, f"{1000 * stage.seconds:,.4g}", rate, share, reached, stage.floor_of]


def _trace(run: Run, path: Path) -> None:
    """A trace by torch.profiler of the real loop, to be opened in ui.perfetto.dev or chrome://tracing."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.engine.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with closing(endless(run.loader)) as batches:
        for _ in range(TRACED):
            train_step(run.engine, run.method, next(batches), 0.0)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(TRACED):
                with torch.profiler.record_function("data"):
                    micro_batches = next(batches)
                with torch.profiler.record_function("step"):
                    result = train_step(run.engine, run.method, micro_batches, 0.0)
                with torch.profiler.record_function("monitors"):
                    run.log.add(result.scalars | run.monitor.observe(result), 0.0)
    profiler.export_chrome_trace(str(path))
    console.print(f"{path}: {TRACED} steps; open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    app()
