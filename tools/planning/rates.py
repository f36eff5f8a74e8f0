"""The rates that a plan needs and cannot know: given on the command line, read from a JSON file, or measured here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.recipe import Recipe
from pipelines.batch import ViewBatch
from trainers.encoders import build_encoder
from trainers.methods import BaseMethod, Facts, build_method

# name -> (unit, how many base units one is, what it is)
NAMES: Mapping[str, tuple[str, float, str]] = {
    "images_per_second": ("images/s", 1, "what one rank trains alone"),
    "matmul_rate": ("TFLOP/s", 1e12, "one rank's matrix products in the loss"),
    "network": ("GB/s", 1e9, "what a rank sends to another of its node"),
    "node_network": ("GB/s", 1e9, "what a node sends to others, all its links together"),
    "latency": ("µs", 1e-6, "a collective of no size"),
    "loading": ("images/s", 1, "what a node reads and decodes"),
    "device_memory": ("GB", 1e9, "of one device"),
}


class RateError(ValueError):
    """A rate that cannot be used; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Rate:
    given: float  # in its unit
    source: str


Rates = dict[str, Rate]


def known(rates: Rates, name: str) -> float | None:
    """In base units: bytes, seconds, operations, images."""
    return rates[name].given * NAMES[name][1] if name in rates else None


def read_rates(path: Path) -> Rates:
    """The ``rates`` of a JSON file that ``tools.plan --json`` or ``benchmarks/scaling.py`` wrote.

    Raises:
        RateError: no such file, or not of this form.
    """
    try:
        content = json.loads(path.read_text())
        found = content["rates"]
        rates = {name: Rate(float(found[name]["value"]), f"{path.name}: {found[name]['source']}") for name in found}
    except OSError as error:
        raise RateError(f"--rates {path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RateError(
            f'--rates {path}: expected {{"rates": {{name: {{"value": number, "source": text}}}}}}, as --json writes it'
        ) from error
    for name, rate in rates.items():
        if name not in NAMES:
            raise RateError(f"--rates {path}: there is no rate {name!r}; there are {', '.join(NAMES)}")
        check_rate(f"--rates {path}: {name}", rate.given)
    return rates


def check_rate(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise RateError(f"{name} is {value:g}, expected a finite number above 0")


def to_json(rates: Rates) -> dict[str, Any]:
    return {name: {"value": rate.given, "unit": NAMES[name][0], "source": rate.source} for name, rate in rates.items()}


def measure(recipe: Recipe, facts: Facts, images: int, seconds: float = 3.0) -> Rates:
    """Both rates of computing, of this machine and process: some seconds each.

    Args:
        images: of a step of one rank.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = build_method(recipe.method, build_encoder(recipe.encoder, facts.image_size), facts).to(device)
    method.to(memory_format=torch.channels_last)
    half = recipe.engine.precision == "bfloat16" or (recipe.engine.precision == "auto" and device.type == "cuda")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    step = _step_of(method, facts, images, device, half)
    spent = _time(step, device, seconds)
    rows = torch.randn(2048, 128, device=device, dtype=torch.float16 if half else torch.float32)
    columns = torch.randn(128, 8192, device=device, dtype=rows.dtype)
    product = _time(lambda: rows @ columns, device, seconds / 3)
    return {
        "images_per_second": Rate(
            round(images / spent, 3),
            f"measured here ({where}): forward and backward of {images} images with their loss, no loader or optimizer",
        ),
        "matmul_rate": Rate(
            round(2 * 2048 * 128 * 8192 / product / 1e12, 4),
            f"measured here ({where}): [2048, 128] × [128, 8192], {str(rows.dtype)[6:]}",
        ),
    }


def _step_of(method: BaseMethod, facts: Facts, images: int, device: torch.device, half: bool) -> Callable[[], None]:
    size, views = facts.image_size, len(facts.plan)
    shown = torch.randn(views, images, 3, size, size, device=device)
    labels = torch.arange(images, device=device) % max(1, facts.classes)
    batch = ViewBatch(shown, labels, torch.arange(images, device=device) % facts.images)
    method.train()

    def step() -> None:
        method.zero_grad()
        with torch.no_grad():
            targets = method.targets(batch)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            if method.view_parts == 1 or method.separable:
                for part in shown.chunk(method.view_parts):
                    method.loss(method.embed(part) | targets, batch, None)["loss"].backward()
                return
            parts = [method.embed(part) for part in shown.chunk(method.view_parts)]
            whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            method.loss(whole | targets, batch, None)["loss"].backward()

    return step


def _time(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median of calls that take some seconds together; at least 3, after one that is not counted."""
    times: list[float] = []
    run()
    while len(times) < 3 or sum(times) < seconds:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
