"""How long a run would take on so many ranks, what they would send each other, and what would hold it up.

    python -m tools.plan configs/imagenet/resnet50_100ep.yaml --images 1281167 --classes 1000 --ranks 8,64,1024
    python -m tools.plan RECIPE.yaml … --images-per-second 1200 --network 300 --node-network 50 --matmul-rate 100
    python -m tools.plan configs/cifar10/simclr.yaml --ranks 1,2 --measure --json plan.json

Bytes, operations and memory follow from the recipe. Rates do not: they are measured numbers that you give, or that
--measure finds on this machine, or that --rates reads from a JSON file; each is printed with its source. What cannot
be said without one is a question mark. Exit code 0, or 2 where nothing can be planned.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from rich.console import Console

from configs.recipe import Recipe, RecipeError, read_recipe
from pipelines.sources import DataError, describe
from tools.planning import writing
from tools.planning.estimate import Cluster, Estimate, divides, estimate, possible_ranks
from tools.planning.model import Model, facts_of, model_of
from tools.planning.rates import NAMES, Rate, RateError, Rates, check_rate, known, measure, read_rates, to_json

_MOST_RANKS = 2**20
Number = TypeVar("Number", int, float)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


class PlanError(ValueError):
    """Nothing can be planned; the message is for the user."""


@app.command()
def main(
    path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, such as 8,64,1024.")] = "1,8,64,1024",
    ranks_per_node: Annotated[int, typer.Option(min=1)] = 8,
    batch_per_rank: Annotated[
        int | None, typer.Option(min=1, help="The batch grows with the ranks; the recipe's unless given.")
    ] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What the ranks are.")] = "cuda",
    images: Annotated[float | None, typer.Option(help="Trained on, such as 100e6; the recipe's set's.")] = None,
    classes: Annotated[int | None, typer.Option(min=0, help="Of the online probe; 0: no labels.")] = None,
    image_bytes: Annotated[float | None, typer.Option(help="Of a stored image.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="As of tools.convert, MiB.")] = 256,
    images_per_second: Annotated[
        str | None, typer.Option(help="That one rank trains alone; of 500,1000 hours are told for each.")
    ] = None,
    matmul_rate: Annotated[float | None, typer.Option(help="TFLOP/s of one rank, in the loss's products.")] = None,
    network: Annotated[float | None, typer.Option(help="GB/s that a rank sends inside its node.")] = None,
    node_network: Annotated[float | None, typer.Option(help="GB/s that a node sends to others.")] = None,
    latency: Annotated[float | None, typer.Option(help="µs of a collective of no size.")] = None,
    loading: Annotated[float | None, typer.Option(help="Images/s that a node reads and decodes.")] = None,
    device_memory: Annotated[float | None, typer.Option(help="GB.")] = None,
    measured: Annotated[bool, typer.Option("--measure", help="Measure this machine's rates of computing.")] = False,
    rates_file: Annotated[Path | None, typer.Option("--rates", help="JSON with rates.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it there as well.")] = None,
) -> None:
    """Plan a run of a recipe on so many ranks."""
    given = {
        "matmul_rate": matmul_rate,
        "network": network,
        "node_network": node_network,
        "latency": latency,
        "loading": loading,
        "device_memory": device_memory,
    }
    try:
        recipe = read_recipe(path, overrides or [])
        counts = sorted(set(_numbers("--ranks", ranks, int)))
        if counts[-1] > _MOST_RANKS:
            raise PlanError(f"--ranks {ranks}: at most {_MOST_RANKS:,}")
        images_, classes_, size = _data(recipe, images, classes)
        if image_bytes is not None:
            check_rate("--image-bytes", image_bytes)
        speeds = _numbers("--images-per-second", images_per_second, float) if images_per_second else []
        rates = _rates(given | ({"images_per_second": speeds[0]} if speeds else {}), rates_file)
        cluster = Cluster(images_, ranks_per_node, device, batch_per_rank, rates)
        _check(recipe, cluster, counts, size)
        if measured:
            facts = facts_of(recipe, images=images_, classes=classes_, size=size)
            found = measure(recipe, facts, batch_per_rank or recipe.batch_size // counts[0])
            rates |= {name: rate for name, rate in found.items() if name not in rates}
        model = model_of(recipe, images=images_, classes=classes_, size=size)
        estimates = [estimate(recipe, model, cluster, count) for count in counts]
        doublings = possible_ranks(recipe, cluster, max(counts))
        everywhere = [estimate(recipe, model, cluster, count) for count in doublings]
        hours = {speed: _at(speed, recipe, model, cluster, counts) for speed in speeds[1:] and speeds}
        _print(recipe, model, cluster, path, estimates, everywhere, hours, image_bytes, shard_mb)
        if json_file is not None:
            content = _json(recipe, model, cluster, path, estimates, everywhere)
            json_file.write_text(json.dumps(content, indent=2) + "\n")
    except (RecipeError, DataError, RateError, PlanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        whole = "whole numbers" if kind is int else "numbers"
        raise PlanError(f"{option} {text!r}: expected {whole} above 0 with commas between them, such as 8,64,1024")
    return numbers


def _data(recipe: Recipe, images: float | None, classes: int | None) -> tuple[int, int, int]:
    """Images, classes and side of a view: as given, else as the recipe's set has them."""
    if images is not None and not (1 <= images <= 1e12 and math.isfinite(images)):
        raise PlanError(f"--images {images:g}: expected a number from 1 to 1e12")
    if images is not None and classes is not None and recipe.views.size is not None:
        return int(images), classes, recipe.views.size
    try:
        facts = describe(recipe.data.model_copy(update={"download": False}))
    except DataError as error:
        asked = {"--images": images, "--classes": classes, "views.size=": recipe.views.size}
        missing = " and ".join(name for name, value in asked.items() if value is None)
        raise PlanError(f"{str(error).splitlines()[0]}\nto plan without the images, give {missing}") from error
    count = int(images) if images is not None else facts.counts["pretrain"] or 0
    return count, facts.num_classes if classes is None else classes, recipe.views.size or facts.image_size


def _rates(given: dict[str, float | None], file: Path | None) -> Rates:
    rates = {} if file is None else read_rates(file)
    for name, value in given.items():
        if value is not None:
            check_rate("--" + name.replace("_", "-"), value)
            rates[name] = Rate(value, "given")
    return rates


def _at(speed: float, recipe: Recipe, model: Model, cluster: Cluster, counts: list[int]) -> list[Estimate]:
    """The same ranks, if one trained so many images a second."""
    other = replace(cluster, rates=cluster.rates | {"images_per_second": Rate(speed, "given")})
    return [estimate(recipe, model, other, count) for count in counts]


def _check(recipe: Recipe, cluster: Cluster, counts: list[int], size: int) -> None:
    for count in counts:
        if not divides(recipe, cluster, count):
            batch = cluster.batch_per_rank or recipe.batch_size
            which = "--batch-per-rank" if cluster.batch_per_rank else "batch_size"
            raise PlanError(
                f"{which}={batch} cannot be divided over {count:,} ranks × engine.accumulation="
                f"{recipe.engine.accumulation}; give other --ranks, or --batch-per-rank"
            )
        batch = cluster.batch_per_rank * count if cluster.batch_per_rank else recipe.batch_size
        if batch > cluster.images:
            raise PlanError(f"a batch of {batch:,} is larger than the {cluster.images:,} training images")
    try:
        recipe.method.check_views(recipe.views.resolve())
        recipe.method.check(images=cluster.images, batch_size=recipe.batch_size, image_size=size)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _print(
    recipe: Recipe,
    model: Model,
    cluster: Cluster,
    path: Path,
    estimates: list[Estimate],
    everywhere: list[Estimate],
    hours: dict[float, list[Estimate]],
    image_bytes: float | None,
    shard_mb: int,
) -> None:
    blocks = [
        writing.heading(recipe, model, cluster, path.name),
        writing.run_table(estimates),
        writing.traffic_table(estimates),
        writing.memory_table(estimates, known(cluster.rates, "device_memory")),
        writing.compute_table(estimates),
    ]
    if hours:
        blocks.insert(2, writing.hours_table(hours))
    if image_bytes is not None:
        blocks.append(writing.storage(cluster, image_bytes, shard_mb, estimates))
    blocks.append(writing.words(estimates, everywhere, cluster))
    missing = [
        name for name in ("images_per_second", "matmul_rate", "network", "node_network") if name not in cluster.rates
    ]
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')} ({NAMES[name][2]})" for name in missing)
        blocks.append(iter([f"Not given: {options}."]))
    console.print("\n\n".join("\n".join(block) for block in blocks))


def _json(
    recipe: Recipe, model: Model, cluster: Cluster, path: Path, estimates: list[Estimate], everywhere: list[Estimate]
) -> dict[str, Any]:
    return {
        "recipe": path.name,
        "method": recipe.method.name,
        "images": cluster.images,
        "epochs": recipe.epochs,
        "device": cluster.device,
        "ranks_per_node": cluster.a_node,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rates": to_json(cluster.rates),
        "model": {
            "parameters": model.parameters,
            "batchnorms": len(model.norms),
            "flops_per_image": model.step_flops,
        },
        "plan": [one.to_json() for one in estimates],
        "doublings": [one.to_json() for one in everywhere],
    }


if __name__ == "__main__":
    app()
