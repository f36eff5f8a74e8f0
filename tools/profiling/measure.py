"""Measures every part of a run alone and all of them together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from configs.recipe import Recipe
from pipelines.batch import ViewBatch
from pipelines.loading import cores_of_a_rank
from tools.profiling.limits import Limits, measure_limits
from tools.profiling.pieces import Pieces
from tools.profiling.timing import Clock
from tools.tuning.batch_size import endless
from trainers.memory import is_out_of_memory
from trainers.pretrain import Run

WINDOWS = 3  # of steps with the loader, and as many without
MODEL = ("encoder", "heads", "targets", "loss", "update", "optimizer", "monitors", "communication")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of one step of one rank."""

    name: str
    seconds: float
    floor: float | None = None  # seconds that the device's own limits would allow
    floor_of: str = ""  # which limit

    @property
    def reached(self) -> float | None:
        return None if self.floor is None else self.floor / self.seconds


@dataclass(frozen=True, slots=True)
class Variant:
    """The encoder, forward and backward, under another setting."""

    name: str
    setting: str  # what to write into the recipe
    speed: float  # images/s over those of the recipe's setting


@dataclass(slots=True)
class Profile:
    batch_size: int  # images a step, of all ranks
    loader: str
    facts: dict[str, Any]
    limits: Limits
    data: list[Stage]  # alone: read, decode, photometry, and the loader as a whole, which overlaps them
    step: list[Stage]  # parts of a step on resident data, and what they leave over: together "step"
    step_seconds: float  # on resident data
    whole_seconds: float  # with the loader
    waiting: float  # share of those, for the next batch
    variants: list[Variant] = field(default_factory=list)

    def rate(self, seconds: float) -> float:
        """Images/s of all ranks."""
        return self.batch_size / seconds

    @property
    def shares(self) -> dict[str, float]:
        """Of the whole step: ``data`` is what the loader adds to a step on resident data; they sum to about 1."""
        added = max(0.0, self.whole_seconds - self.step_seconds)
        return {"data": added / self.whole_seconds} | {
            stage.name: min(1.0, stage.seconds / self.whole_seconds) for stage in self.step
        }

    @property
    def bottleneck(self) -> str:
        """``data`` where the loader alone is slower than the step, else the part with the largest share.

        A loader that runs beside the step adds only what it is slower by, however fast the encoder were.
        """
        found = self.shares
        if any(stage.name == "loader" and stage.seconds > self.step_seconds for stage in self.data):
            return "data"
        return max(found, key=lambda name: found[name])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "images_per_second": {
                "whole": self.rate(self.whole_seconds),
                "step": self.rate(self.step_seconds),
                **{stage.name: self.rate(stage.seconds) for stage in [*self.data, *self.step] if stage.seconds},
            }
        }


def profile_run(run: Run, recipe: Recipe, *, seconds: float, compiled: bool, say: Callable[[str], None]) -> Profile:
    """Measure a run that has not begun; every rank must call it.

    Args:
        seconds: about so long for each part, and at least three times.
        compiled: whether to try ``torch.compile`` on the encoder, which takes a minute or more.
        say: told what is measured next.
    """
    ranks, loader = run.engine.ranks, run.loader
    clock = Clock(ranks)
    dtype = precision_of(recipe, ranks.device)
    run.method.train()
    say("the device's limits")
    limits = measure_limits(clock, dtype, seconds)
    with closing(endless(loader)) as batches:
        micro_batches = next(batches)
        pieces = Pieces(run, micro_batches, dtype)
        say("the data alone")
        data = _data_stages(pieces, clock, limits, batches, recipe, seconds)
        say("the parts of the step")
        parts = _step_stages(pieces, clock, limits, seconds)
        say("all together")
        step_seconds, whole_seconds, waiting = _with_loader(pieces, clock, batches, seconds)
    rest = max(0.0, step_seconds - sum(stage.seconds for stage in parts))
    parts.append(Stage("rest", rest))
    facts = {
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
        "ranks": ranks.world_size,
        "threads": torch.get_num_threads(),
        "cores_of_a_rank": cores_of_a_rank(),
        "workers": getattr(loader, "workers", None),
        "torch": torch.__version__,
        "views": list(micro_batches[0].views.shape),
        "micro_batches": len(micro_batches),
    }
    found = Profile(
        recipe.batch_size,
        loader_name(loader),
        facts,
        limits,
        data,
        parts,
        step_seconds,
        whole_seconds,
        waiting,
    )
    # The others matter only where the encoder does, and all ranks must try the same.
    if ranks.from_main(found.bottleneck == "encoder"):
        say("the encoder under other settings")
        found.variants = _variants(pieces, clock, recipe, seconds, compiled)
    return found


def precision_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What the engine multiplies in."""
    asked = recipe.engine.precision
    if asked == "auto":
        asked = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, asked)


def loader_name(loader: Any) -> str:
    return type(loader).__module__.rpartition(".")[2]


def _data_stages(
    pieces: Pieces,
    clock: Clock,
    limits: Limits,
    batches: Iterator[list[ViewBatch]],
    recipe: Recipe,
    seconds: float,
) -> list[Stage]:
    stages, images = [], sum(len(micro.labels) for micro in pieces.micro_batches)
    for name, piece in (("read", pieces.read()), ("decode", pieces.decode())):
        if piece is not None:
            call, count = piece
            stages.append(Stage(name, clock.in_turns({name: call}, seconds)[name] * images / count))
    decode = next((stage.seconds for stage in stages if stage.name == "decode"), None)
    views = sum(micro.views.numel() for micro in pieces.micro_batches)
    size = pieces.micro_batches[0].views.element_size()
    render = clock.in_turns({"photometry": pieces.photometry(recipe.seed)}, seconds)["photometry"]
    stages.append(Stage("photometry", render, views * (1 + size) / limits.copy, "bytes in and out, at the copy's rate"))
    spent = _paced(clock, seconds, lambda: next(batches), _filled(pieces.run.loader))
    if decode is not None:
        stages.append(Stage("loader", spent, decode, "each image decoded whole, once; scaled decoding can be faster"))
    else:
        stages.append(Stage("loader", spent, views * (2 + size) / limits.copy, "bytes in and out, at the copy's rate"))
    return stages


def _step_stages(pieces: Pieces, clock: Clock, limits: Limits, seconds: float) -> list[Stage]:
    pieces.step()  # the first allocates the optimizer's state
    made = {
        "encoder": pieces.encoder,
        "heads": pieces.heads(),
        "targets": pieces.targets(),
        "loss": pieces.loss(),
        "update": pieces.update(),
        "monitors": pieces.observed,
        "communication": pieces.communication(),
    }
    calls: dict[str, Callable[[], Any]] = {name: call for name, call in made.items() if call is not None}
    optimizer = pieces.run.engine.optimizer
    with pieces.optimizer_timed(optimizer) as updates:
        spent = clock.in_turns({"step": pieces.step, **calls}, seconds)  # the step, for its optimizer
    spent["optimizer"] = statistics.median(updates)
    multiplied = {name: pieces.operations(calls[name]) for name in ("encoder", "heads", "loss")}
    # Weight and gradient are read, the weight is written; each buffer (momentum, …) is read and written.
    trained = [p for p in pieces.method.parameters() if p.requires_grad]
    buffers = sum(value.dim() > 0 for value in optimizer.state.get(trained[0], {}).values()) if trained else 0
    passes = 3 + 2 * (buffers or 1)  # under ZeRO the state is not by parameter
    moved = passes * sum(p.numel() * p.element_size() for p in trained)
    floors: dict[str, tuple[float, str]] = {
        name: (flops / limits.matmul, f"{flops / 1e9:,.3g} GFLOP at the matrix product's rate")
        for name, flops in multiplied.items()
        if flops
    }
    floors["optimizer"] = moved / limits.copy, f"{passes} passes over the weights, at the copy's rate"
    return [Stage(name, spent[name], *floors.get(name, (None, ""))) for name in MODEL if name in spent]


def _with_loader(
    pieces: Pieces, clock: Clock, batches: Iterator[list[ViewBatch]], seconds: float
) -> tuple[float, float, float]:
    """(seconds of a step on resident data, of one of the real loop, the share of that spent waiting for a batch).

    The two take turns, since a machine is not equally fast for long. What the loader has ready when its turn begins
    does not count; and steps on resident data begin when it has filled up again, and takes no cores from them.
    """
    filled = _filled(pieces.run.loader)
    waited: list[float] = []

    def whole() -> None:
        start = time.perf_counter()
        micro_batches = next(batches)
        waited.append(time.perf_counter() - start)
        pieces.step(micro_batches, waited[-1])

    resident: list[float] = []
    looped: list[float] = []
    shares: list[float] = []
    steps = clock.rounds(3 * clock(whole), seconds)
    for _ in range(WINDOWS):
        _at_rest()
        alone = _repeated_call(clock, pieces.step, steps)
        for _ in range(filled):
            whole()
        waited.clear()
        together = _repeated_call(clock, whole, steps)
        resident.append(alone / steps)
        looped.append(together / steps)
        shares.append(sum(waited) / together)
    return statistics.median(resident), statistics.median(looped), statistics.median(shares)


def _variants(pieces: Pieces, clock: Clock, recipe: Recipe, seconds: float, compiled: bool) -> list[Variant]:
    """What the encoder would do in another memory format, precision or batch, or compiled."""
    encoder, method = pieces.method.encoder, pieces.method
    settings = _alternatives(pieces, recipe, compiled)
    found = []
    for name, setting, other, dtype, repeat in settings:
        try:
            tried = Pieces(pieces.run, _repeated(pieces.micro_batches, repeat), dtype)

            def call(tried: Pieces = tried, other: Any = other) -> None:
                method.encoder = other
                try:
                    tried.encoder()
                finally:
                    method.encoder = encoder

            spent = clock.in_turns({"now": pieces.encoder, name: call}, seconds)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        found.append(Variant(name, setting, spent["now"] / spent[name] * repeat))
    return found


def _alternatives(pieces: Pieces, recipe: Recipe, compiled: bool) -> list[tuple[str, str, Any, torch.dtype, float]]:
    """(name, setting, encoder, precision, images over the recipe's)."""
    encoder, engine = pieces.method.encoder, recipe.engine
    flipped = torch.contiguous_format if engine.channels_last else torch.channels_last
    copied: Any = deepcopy(encoder).to(memory_format=flipped)
    word = str(not engine.channels_last).lower()
    alternatives = [(f"channels_last {word}", f"engine.channels_last={word}", copied, pieces.dtype, 1.0)]
    if pieces.ranks.device.type == "cuda":
        other = "float32" if pieces.dtype == torch.bfloat16 else "bfloat16"
        alternatives.append((other, f"engine.precision={other}", encoder, getattr(torch, other), 1.0))
    for factor in (0.5, 2.0):
        batch = int(recipe.batch_size * factor)
        if factor > 1 or len(pieces.micro_batches[0].labels) > 1:
            alternatives.append((f"batch of {batch:,}", f"batch_size={batch}", encoder, pieces.dtype, factor))
    if compiled and not engine.compile:
        alternatives.append(("compiled", "engine.compile=true", torch.compile(deepcopy(encoder)), pieces.dtype, 1.0))
    return alternatives


def _repeated(micro_batches: list[ViewBatch], factor: float) -> list[ViewBatch]:
    """The same images so many times, or the first of them."""
    if factor == 1:
        return micro_batches
    times = max(1, int(factor))
    many = []
    for micro in micro_batches:
        kept = len(micro.labels) if factor > 1 else max(1, int(len(micro.labels) * factor))
        many.append(
            ViewBatch(
                micro.views[:, :kept].repeat(1, times, 1, 1, 1),
                micro.labels[:kept].repeat(times),
                micro.indices[:kept].repeat(times),
            )
        )
    return many


def _paced(clock: Clock, seconds: float, step: Callable[[], Any], warm: int) -> float:
    """Mean seconds of as many steps as fit, after ``warm`` of them: what a loader had ready does not count."""
    slowest = max(clock(step) for _ in range(warm))
    count = clock.rounds(slowest, seconds)
    return _repeated_call(clock, step, count) / count


def _repeated_call(clock: Clock, call: Callable[[], Any], count: int) -> float:
    """Seconds of ``count`` calls, one right after the other."""

    def run() -> None:
        for _ in range(count):
            call()

    return clock(run)


def _at_rest() -> None:
    """Wait until no thread or worker of this process computes; half a minute at most."""
    end = time.perf_counter() + 30
    while time.perf_counter() < end:
        before = _cpu_seconds()
        time.sleep(0.1)
        if _cpu_seconds() - before < 0.02:
            return


def _cpu_seconds() -> float:
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _filled(loader: Any) -> int:
    """How many batches a loader may have ready."""
    config = getattr(loader, "config", None)
    return 2 if config is None else config.ahead + 2
