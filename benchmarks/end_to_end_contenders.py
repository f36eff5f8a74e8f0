"""Who trains in `benchmarks/end_to_end.py`: each a function that makes so many SimCLR steps from stored images.

Every contender lives in a process of its own. It makes a pass whenever a line comes in, and answers with the seconds,
the CPU-seconds and the largest memory that it took, worker processes included.
"""

from __future__ import annotations

import atexit
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tools.profiling.stub import StubEncoder
from trainers.encoders import EncoderConfig, build_encoder

OUTPUT, TEMPERATURE = 128, 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRENGTH = {16: 0.5, 32: 0.5}  # of the colours; 1 at other sizes, where there is blur too

Pass = Callable[[int], None]  # makes so many steps


def make_encoder(arch: str, size: int) -> Any:
    return StubEncoder(size) if arch == "stub" else build_encoder(EncoderConfig(arch=arch), size)


# ---- ours -------------------------------------------------------------------------------------------------


def ours(data: Path, arch: str, size: int, batch: int, workers: int, loader: str = "auto") -> Pass:
    """The parts that ``train.py`` builds from a recipe, in the order of its loop."""
    from configs.recipe import load_recipe
    from tools.tuning.batch_size import endless
    from train import build_run
    from trainers.engine import joined_ranks
    from trainers.heap import keep_freed_memory
    from trainers.nonfinite import NonfiniteGuard

    folder = Path(tempfile.mkdtemp())
    recipe_path = folder / "recipe.yaml"
    recipe_path.write_text(
        json.dumps(
            {
                "batch_size": batch,
                "data": {
                    "source": "folder",
                    "root": str(data),
                    "holdout": 0,
                    "loader": loader,
                    "workers": workers,
                },
                "views": {"plan": "simclr_cifar" if size in STRENGTH else "simclr", "size": size},
                "encoder": {"arch": "resnet8x4" if arch == "stub" else arch},
                "method": {
                    "name": "simclr",
                    "temperature": TEMPERATURE,
                    "projector": {"layers": 2, "output": OUTPUT, "batchnorm": "none"},
                },
                "optim": {"name": "adam", "lr": 3e-4, "lr_scaling": "none"},
                "schedule": {"name": "constant", "warmup_epochs": 0},
            }
        )
    )
    recipe = load_recipe(recipe_path)
    held = ExitStack()
    atexit.register(held.close)
    ranks = held.enter_context(joined_ranks(recipe.engine))
    keep_freed_memory(recipe.engine, ranks.device)
    run = build_run(recipe, folder, ranks, make_encoder(arch, size))
    run.method.train()
    run.log.open(0)
    guard = NonfiniteGuard(run.engine, run.method, run.loader, folder, run.log)
    batches = endless(run.loader)
    numbers = itertools.count(1)

    def steps(count: int) -> None:
        for _ in range(count):
            number = next(numbers)
            scalars = guard.step(number, next(batches), run.schedule(number - 1), run.monitor.observe)
            run.log.add(scalars, 0.0)
            ranks.highest(0, 0, 0)
            if number % run.log.config.every_steps == 0:
                run.log.write_step(number, 0.0, 0.0)

    return steps


# ---- the SimCLR code bases, from their description --------------------------------------------------------


def plain_view(size: int) -> Callable[[Any], Tensor]:
    """SimCLR's view of a Pillow image, by torchvision's transforms."""
    from torchvision import transforms

    strength = STRENGTH.get(size, 1.0)
    colours = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    kernel = size // 10 | 1
    blur = [transforms.RandomApply([transforms.GaussianBlur(kernel, (0.1, 2.0))], 0.5)] if size not in STRENGTH else []
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([colours], 0.8),
            transforms.RandomGrayscale(0.2),
            *blur,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def plain(data: Path, arch: str, size: int, batch: int, workers: int) -> Pass:
    """The loop of the SimCLR code bases: Pillow and torchvision in worker processes, one forward a view, the whole
    2N x 2N matrix with a mask, Adam, the loss read in every step."""
    view = plain_view(size)
    images = torchvision.datasets.ImageFolder(str(data), transform=lambda image: (view(image), view(image)))
    return _trained(Loop(arch, size, NTXent()), _endless(images, batch, workers), torch.optim.Adam, {"lr": 3e-4})


class NTXent(nn.Module):
    """The usual form: every similarity in one matrix, the diagonal masked, cross-entropy."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]))
        logits = z @ z.T / TEMPERATURE
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        count = len(z1)
        return F.cross_entropy(logits, torch.arange(2 * count).roll(count))


# ---- lightly, as its SimCLR example has it ----------------------------------------------------------------


def lightly(data: Path, arch: str, size: int, batch: int, workers: int) -> Pass:
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    strength = STRENGTH.get(size, 1.0)
    blur = 0.0 if size in STRENGTH else 0.5
    transform = SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur)
    images = torchvision.datasets.ImageFolder(str(data), transform=transform)
    loop = Loop(arch, size, NTXentLoss(temperature=TEMPERATURE))
    return _trained(loop, _endless(images, batch, workers), torch.optim.SGD, {"lr": 0.06})


class Loop(nn.Module):
    def __init__(self, arch: str, size: int, criterion: nn.Module) -> None:
        super().__init__()
        self.encoder, self.criterion = make_encoder(arch, size), criterion
        width = self.encoder.features
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, OUTPUT))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.head(self.encoder(x1)), self.head(self.encoder(x2)))
        return loss


def _trained(loop: Loop, batches: Iterator[Any], optimizer: Any, settings: dict[str, Any]) -> Pass:
    update = optimizer(loop.parameters(), **settings)

    def steps(count: int) -> None:
        for _ in range(count):
            (x1, x2), _ = next(batches)
            loss = loop(x1, x2)
            loss.backward()
            update.step()
            update.zero_grad()
            loss.item()

    return steps


def _endless(images: Any, batch: int, workers: int) -> Iterator[Any]:
    loader = torch.utils.data.DataLoader(
        images, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        yield from loader


# ---- answering --------------------------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[..., Pass]] = {
    "ours": ours,
    "decoding": partial(ours, loader="native"),
    "plain": plain,
    "lightly": lightly,
}


class Memory(threading.Thread):
    """The largest memory of this process and its workers, pages that they share counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            own = psutil.Process()
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def cpu_seconds() -> float:
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def main() -> None:
    name, data, arch, size, batch, workers, steps = sys.argv[1:]
    with redirect_stdout(sys.stderr):
        work = CONTENDERS[name](Path(data), arch, int(size), int(batch), int(workers))
        memory = Memory()
        for _ in sys.stdin:
            start, cpu = time.perf_counter(), cpu_seconds()
            work(int(steps))
            spent = {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}
            answer = spent | {"images": int(steps) * int(batch), "peak_mb": memory.peak / 1e6}
            print(json.dumps(answer), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
