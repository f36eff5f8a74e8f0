"""What a whole step adds to the bare encoder: ``python benchmarks/step.py [--size …] [--compile] [--json FILE]``.

On resident random views, of one shape, in turns and in one process: forward and backward of the encoder alone on the
concatenated batch, and the step as the training loop makes it (heads, loss, DeepSpeed, optimizer, guard, log and
monitors), then the same without one part after the other. On a CPU processor time is measured, which neighbours on the
machine change least; on a GPU the time from an idle device to an idle device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

from benchmarks.harness import machine
from pipelines.batch import ViewBatch
from pipelines.views import ViewsConfig
from trainers.encoders import EncoderConfig, build_encoder
from trainers.engine import Engine, EngineConfig, Ranks, joined_ranks, prepare_module
from trainers.methods import BaseMethod, Facts, build_method, find_method
from trainers.monitors import Probe
from trainers.nonfinite import NonfiniteGuard
from trainers.optim import OptimConfig, build_optimizer
from trainers.runlog import LogConfig, RunLog
from trainers.step import StepResult, compile_embedding, optimise

CLASSES = 10
TARGET = 1.07  # of the bare encoder's time


@dataclass(frozen=True)
class Size:
    arch: str
    pixels: int
    images: int


ON_CPU = (Size("resnet18", 32, 64), Size("resnet50", 224, 4), Size("resnet8x4", 32, 64))
ON_GPU = (Size("resnet18", 32, 512), Size("resnet50", 224, 256), Size("resnet50", 224, 512))


class Steps:
    """One method under the engine, and the ways to make a step of it."""

    def __init__(self, size: Size, optimizer: str, compiled: bool, ranks: Ranks, folder: Path) -> None:
        self.ranks, device = ranks, ranks.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        views = torch.randn(2, size.images, size.pixels, size.pixels, 3, generator=generator).to(device)
        labels = (torch.arange(size.images) % CLASSES).to(device)
        self.batch = ViewBatch(views.permute(0, 1, 4, 2, 3), labels, torch.arange(size.images).to(device))
        torch.manual_seed(0)
        self.bare = build_encoder(EncoderConfig(arch=size.arch), size.pixels).to(device)
        self.bare.to(memory_format=torch.channels_last)
        config = EngineConfig(compile=compiled)
        self.method = _method(size)
        prepare_module(self.method, config, ranks)
        if compiled:
            compile_embedding(self.method, config)
            self.bare.compile(dynamic=False)
        made = build_optimizer(OptimConfig(name=optimizer, weight_decay=1e-6), self.method, 1e-3)
        self.engine = Engine(self.method, made, config, ranks, size.images)
        self.probe = Probe(self.bare.features, CLASSES, 1e-3, device)  # type: ignore[arg-type]
        loader: Any = None  # asked only where a step is not finite
        self.log = RunLog(LogConfig(), folder, ranks, total_steps=1 << 30, batch_size=size.images, recipe={})
        self.guard = NonfiniteGuard(self.engine, self.method, loader, folder, self.log)
        self._number = 0

    def encoder(self) -> None:
        for parameter in self.bare.parameters():
            parameter.grad = None
        with torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.bare(self.batch.views.flatten(0, 1))
        features.sum().backward()

    def whole(self) -> None:
        self._number += 1
        self.log.add(self.guard.step(self._number, [self.batch], 1e-3, self._observed), 0.0)
        if self._number % self.log.config.every_steps == 0:
            self.log.write_step(self._number, 0.0, 1e-3)

    def without_log_and_monitor(self) -> None:
        self._number += 1
        self.guard.step(self._number, [self.batch], 1e-3, lambda result: {})

    def optimised(self) -> None:
        optimise(self.engine, self.method, [self.batch], 1e-3)

    def _observed(self, result: StepResult) -> dict[str, Tensor]:
        return {"probe_loss": self.probe.fit(result.embeddings["features"], result.batch.labels, None)}


def _method(size: Size) -> BaseMethod:
    config = find_method("simclr").Config(name="simclr")
    facts = Facts(
        image_size=size.pixels,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        images=50_000,
        classes=CLASSES,
        multi_label=False,
        seed=0,
        batch_size=size.images,
        steps_per_epoch=100,
        total_steps=1000,
        plan=ViewsConfig(plan="simclr").resolve(),
        steady=True,
    )
    method = build_method(config, build_encoder(EncoderConfig(arch=size.arch), size.pixels), facts)
    method.train()
    return method


def measured(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns, after two that warm."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for call in (*calls.values(), *calls.values()):
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait(device)
            start = clock()
            call()
            _wait(device)
            spent[name].append(1000 * (clock() - start))
    return spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(size: Size, optimizer: str, compiled: bool, ranks: Ranks, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(size, optimizer, compiled, ranks, Path(folder))
        steps.log.open(0)
        calls = {
            "encoder forward + backward": steps.encoder,
            "whole step": steps.whole,
            "without log and monitor": steps.without_log_and_monitor,
            "without the guard": steps.optimised,
        }
        if steps.log._board is not None:  # its writer's thread is no part of a step
            steps.log._board.close()
            steps.log._board = None
        spent = measured(calls, ranks.device, rounds)
        steps.log.active = False
    bare = spent["encoder forward + backward"]
    ratios = {name: statistics.median(a / b for a, b in zip(own, bare, strict=True)) for name, own in spent.items()}
    parameters = sum(p.numel() for p in steps.method.parameters())
    return {
        "arch": size.arch,
        "pixels": size.pixels,
        "images": size.images,
        "optimizer": optimizer,
        "compiled": compiled,
        "parameters": parameters,
        "ms": {name: statistics.median(own) for name, own in spent.items()},
        "times_encoder": ratios,
        "target": TARGET,
    }


def _size(text: str) -> Size:
    arch, *numbers = text.split(":")
    try:
        pixels, images = map(int, numbers)
        EncoderConfig(arch=arch)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ARCH:PIXELS:IMAGES, as resnet18:32:64") from error
    if min(pixels, images) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pixels and images above 0")
    return Size(arch, pixels, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=_size, nargs="+", metavar="ARCH:PIXELS:IMAGES", help="instead of the usual three"
    )
    parser.add_argument("--compile", action="store_true", help="both sides compiled as well")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "lars", "adam", "adamw"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: expected at least 1")
    results = []
    with joined_ranks(EngineConfig()) as ranks:
        if ranks.world_size > 1:
            parser.error("this measures one process: start it without torchrun")
        sizes = chosen.size or (ON_GPU if ranks.device.type == "cuda" else ON_CPU)
        for compiled in (False, True) if chosen.compile else (False,):
            for size in sizes:
                found = run(size, chosen.optimizer, compiled, ranks, chosen.rounds)
                results.append(found)
                print(
                    f"\n{size.arch}, 2 x {size.images} views of {size.pixels}{', compiled' if compiled else ''}",
                    flush=True,
                )
                for name, milliseconds in found["ms"].items():
                    print(f"  {name:28} {milliseconds:9.2f} ms  {found['times_encoder'][name]:6.3f}", flush=True)
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": machine(), "device": device, "steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
